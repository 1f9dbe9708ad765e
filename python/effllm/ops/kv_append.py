"""kv_append: new keys and values into the pages of the cache."""

import torch
from torch import Tensor

from .._load import ops

_op = ops.kv_append.default


def kv_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot of the paged cache, in place.

    Bits are copied as they are. All of the cache that no slot names keeps its values.

    Args:
        k, v: [T, HKV, D], fp16, bf16 or fp32, any strides with stride(-1) == 1, so that slices of a
            packed qkv tensor need no copy.
        k_cache, v_cache: [NP, P, HKV, D] in the dtype of k, any strides with stride(-1) == 1
            (`effllm.cache` keeps them in memory as [NP, HKV, P, D]). Rows that are 16-byte aligned
            everywhere are copied 16 bytes at a time.
        slot_mapping: int64 [T]: page * P + offset of each token; -1 skips it. Slots must be
            distinct: of two tokens with one slot, either may win.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or, on the CPU, a slot outside
            -1 .. NP * P - 1, before anything is written. A GPU, which cannot raise, skips it.

    Source:
        csrc/kvcache/kv_append.h. Slots of a paged cache as in PagedAttention (arXiv:2309.06180).
    """
    _op(k, v, k_cache, v_cache, slot_mapping)


@torch.library.register_fake(_op.name())
def _fake(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    torch._check(k.dim() == 3, lambda: f"kv_append: k must be [T, HKV, D], got {list(k.shape)}")
    torch._check(
        k.shape == v.shape,
        lambda: f"kv_append: v must have the shape of k, {list(k.shape)}, got {list(v.shape)}",
    )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        torch._check(
            cache.dim() == 4 and cache.shape[2:] == k.shape[1:],
            lambda name=name, cache=cache: (
                f"kv_append: {name} must be [NP, P, HKV, D] = [?, ?, {k.shape[1]}, {k.shape[2]}], "
                f"got {list(cache.shape)}"
            ),
        )
    torch._check(
        slot_mapping.dim() == 1 and slot_mapping.shape[0] == k.shape[0],
        lambda: (
            f"kv_append: slot_mapping must be [T] = [{k.shape[0]}], got {list(slot_mapping.shape)}"
        ),
    )


def kv_append_ref(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: copies of the two caches as kv_append leaves them."""
    written = slot_mapping >= 0
    page_size = k_cache.shape[1]
    pages = torch.div(slot_mapping[written], page_size, rounding_mode="floor")
    offsets = slot_mapping[written] % page_size
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[pages, offsets] = k[written]
    v_cache[pages, offsets] = v[written]
    return k_cache, v_cache
