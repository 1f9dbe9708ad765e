"""kv_append: new keys and values into the pages of the cache."""

import torch
from torch import Tensor

from .._load import ops
from ._kv_codes import as_bits, codes_per_row, quantize_kv

_op = ops.kv_append.default


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write each token's key and value into its slot of the paged cache, in place.

    A cache in the dtype of k gets its bits as they are. One in 8 or 4 bits gets codes, and the
    scale of each token and head beside the pages: max|x| / 448 (e4m3) or / 127 (int8), for int4
    (max - min) / 15 and the code of zero, which may lie outside 0 .. 15. Codes round to nearest
    even and saturate; no NaN code is stored. A row that holds NaN or infinity gets the scale NaN.
    All of the cache that no slot names keeps its values.

    Args:
        k, v: [T, HKV, D], fp16, bf16 or fp32, any strides with stride(-1) == 1, so that slices of a
            packed qkv tensor need no copy.
        k_cache, v_cache: [NP, P, HKV, D] in the dtype of k, in e4m3 (torch.float8_e4m3fn) or int8,
            or int4 as uint8 [NP, P, HKV, D / 2], low nibble first; any strides with
            stride(-1) == 1 (`effllm.cache` keeps them in memory as [NP, HKV, P, D]). Rows that are
            16-byte aligned everywhere are moved 16 bytes at a time.
        slot_mapping: int64 [T]: page * P + offset of each token; -1 skips it. Slots must be
            distinct: of two tokens with one slot, either may win.
        k_scale, v_scale: [NP, P, HKV] fp32 for caches in e4m3 or int8, any strides; for int4
            [NP, P, HKV, 2] fp16, scale and zero, with stride(-1) == 1 and pairs at multiples of 4
            bytes. None for all other caches.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or, on the CPU, a slot outside
            -1 .. NP * P - 1, before anything is written. A GPU, which cannot raise, skips it.

    Source:
        csrc/kvcache/kv_append.h. Slots of a paged cache as in PagedAttention (arXiv:2309.06180).
    """
    _op(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


@torch.library.register_fake(_op.name())
def _fake(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    check_append_shapes("kv_append", k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def check_append_shapes(
    op: str,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """The relations between shapes that fake kernels of ops with these arguments check."""
    check_kv_shapes(op, "T", k, v, k_cache, v_cache, k_scale, v_scale)
    torch._check(
        slot_mapping.dim() == 1 and slot_mapping.shape[0] == k.shape[0],
        lambda: f"{op}: slot_mapping must be [T] = [{k.shape[0]}], got {list(slot_mapping.shape)}",
    )


def check_kv_shapes(
    op: str,
    tokens: str,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Those between tokens and cache; ``tokens`` is what the op calls the first dimension of k."""
    torch._check(k.dim() == 3, lambda: f"{op}: k must be [{tokens}, HKV, D], got {list(k.shape)}")
    torch._check(
        k.shape == v.shape,
        lambda: f"{op}: v must have the shape of k, {list(k.shape)}, got {list(v.shape)}",
    )
    row = codes_per_row(k.shape[2], k_cache.dtype)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        torch._check(
            cache.dim() == 4 and cache.shape[2:] == (k.shape[1], row),
            lambda name=name, cache=cache: (
                f"{op}: {name} must be [NP, P, HKV, D] = [?, ?, {k.shape[1]}, {row}], "
                f"got {list(cache.shape)}"
            ),
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        torch._check(
            scale is None or scale.shape[:3] == k_cache.shape[:3],
            lambda name=name, scale=scale: (
                f"{op}: {name} must be [NP, P, HKV] = {list(k_cache.shape[:3])}, "
                f"got {list(scale.shape)}"
            ),
        )


def kv_append_ref(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Plain PyTorch: copies of the caches, and of their scales, as kv_append leaves them."""
    written = slot_mapping >= 0
    page_size = k_cache.shape[1]
    pages = torch.div(slot_mapping[written], page_size, rounding_mode="floor")
    offsets = slot_mapping[written] % page_size
    caches = [k_cache.clone(), v_cache.clone()]
    scales = [scale.clone() for scale in (k_scale, v_scale) if scale is not None]
    for index, rows in enumerate((k[written], v[written])):
        if scales:
            rows, scales[index][pages, offsets] = quantize_kv(rows, k_cache.dtype)
        as_bits(caches[index])[pages, offsets] = as_bits(rows)
    return (*caches, *scales)
