"""block_copy: whole pages from one place of a cache to another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._load import ops
from ._kv_codes import as_bits

_op = ops.block_copy.default


def block_copy(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy page ``src[c]`` over page ``dst[c]`` in every cache, in place.

    What copy-on-write needs before a sequence appends to a page that others can see, for all layers
    in one launch. Bits are copied as they are. A page that lies in one piece, in whatever order
    its dimensions are, is copied fastest.

    Args:
        caches: any number of tensors [NP, ...] of 1 to 5 dimensions, of any dtypes (bf16, e4m3,
            uint8, ...) and any strides: K and V of all layers, and the scales of quantised caches.
        src, dst: int64 [C]: pages. An entry with a negative src or dst, or with src == dst, does
            nothing. All other dst must be distinct, and none may also be a src.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or, on the CPU, a page beyond
            NP - 1, or a dst that another entry reads or writes, before anything is written. A GPU,
            which cannot raise, skips pages out of range, and leaves undefined what pages hold that
            are written twice, or written and read.

    Source:
        csrc/kvcache/block_copy.h. Copy-on-write of pages as in PagedAttention (arXiv:2309.06180).
    """
    _op(caches, src, dst)


@torch.library.register_fake(_op.name())
def _fake(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    torch._check(
        src.dim() == 1 and src.shape == dst.shape,
        lambda: f"block_copy: src and dst must be [C], got {list(src.shape)} and {list(dst.shape)}",
    )
    for index, cache in enumerate(caches):
        torch._check(
            1 <= cache.dim() <= 5 and cache.shape[0] == caches[0].shape[0],
            lambda index=index, cache=cache: (
                f"block_copy: caches[{index}] must be [NP, ...] as caches[0] is, "
                f"{list(caches[0].shape)}, got {list(cache.shape)}"
            ),
        )


def block_copy_ref(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> tuple[Tensor, ...]:
    """Plain PyTorch: copies of the caches as block_copy leaves them."""
    copied = (src >= 0) & (dst >= 0)
    results = []
    for cache in caches:
        result = cache.clone()
        as_bits(result)[dst[copied]] = as_bits(cache)[src[copied]]
        results.append(result)
    return tuple(results)
