"""rope_kv_append: rotary embedding of q and k, and k and v into the cache, in one launch."""

import torch
from torch import Tensor

from .._autograd import refusing_backward
from .._load import ops
from .kv_append import check_append_shapes, kv_append_ref

_op = ops.rope_kv_append.default


def rope_kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotate q and k by their positions; return q, write k and v into the paged cache, in place.

    Exactly ``kv_append(rotated k, v, ...)``, to the bit and for every dtype of the cache, without a
    pass over memory between the two. Elements a, b of a head become a * cos - b * sin and
    b * cos + a * sin in fp32, each product and the sum rounded by itself as PyTorch does, and once
    to the dtype of q. Models in transformers round cos, sin and each product to that dtype: in fp32
    the results are equal, in 16 bits these are the closer ones.
    Where D and R / 2 are multiples of 8 (interleaved: R of 8) and all rows 16-byte aligned, a GPU
    moves 16 bytes at a time.

    Args:
        q: [T, HQ, D], fp16, bf16 or fp32, any strides with stride(-1) == 1, so that slices of a
            packed qkv tensor need no copy.
        k, v: [T, HKV, D] in the dtype of q, likewise.
        cos, sin: fp32 [MAXPOS, R / 2], any strides with stride(-1) == 1. The first R <= D elements
            of each head are rotated, the others keep their bits.
        positions: int64 [T]: the row of cos and sin for each token, also for those that
            ``slot_mapping`` skips.
        k_cache, v_cache: [NP, P, HKV, D] in the dtype of q, in e4m3 (torch.float8_e4m3fn) or int8,
            or int4 as uint8 [NP, P, HKV, D / 2]: as in ``kv_append``.
        slot_mapping: int64 [T]: page * P + offset of each token, distinct; -1 skips it, and rotates
            its q all the same (padding rows of a CUDA graph).
        k_scale, v_scale: [NP, P, HKV] fp32, or for int4 [NP, P, HKV, 2] fp16: as in ``kv_append``.
        interleaved: which elements belong together: i and i + R / 2 (False: Llama, GPT-NeoX), or
            2i and 2i + 1 (True: GPT-J).

    Returns:
        q rotated, [T, HQ, D] in the dtype of q, contiguous.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or, on the CPU, a slot outside
            -1 .. NP * P - 1 or a position outside 0 .. MAXPOS - 1, before anything is written. A
            GPU, which cannot raise, skips such a slot, and what such a position should have rotated
            is NaN. The backward pass: this is an inference op.

    Source:
        csrc/kvcache/rope_kv_append.h. Rotary embedding as in RoFormer (arXiv:2104.09864), in part
        of a head as in GPT-NeoX (arXiv:2204.06745).
    """
    out = _op(
        q,
        k,
        v,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        slot_mapping,
        k_scale,
        v_scale,
        interleaved=interleaved,
    )
    return refusing_backward(out, _op)


@torch.library.register_fake(_op.name())
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    check_append_shapes("rope_kv_append", k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    torch._check(
        q.dim() == 3 and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2],
        lambda: (
            f"rope_kv_append: q must be [T, HQ, D] = [{k.shape[0]}, ?, {k.shape[2]}], "
            f"got {list(q.shape)}"
        ),
    )
    torch._check(
        cos.dim() == 2 and cos.shape == sin.shape and 2 * cos.shape[1] <= q.shape[2],
        lambda: (
            f"rope_kv_append: cos and sin must be [MAXPOS, R / 2] with R up to {q.shape[2]}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        ),
    )
    torch._check(
        positions.dim() == 1 and positions.shape[0] == q.shape[0],
        lambda: (
            f"rope_kv_append: positions must be [T] = [{q.shape[0]}], got {list(positions.shape)}"
        ),
    )
    return q.new_empty(q.shape)


def rotate_ref(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Plain PyTorch: x [T, H, D] rotated in fp32 and rounded to its dtype."""
    half = cos.shape[1]
    pairs, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    axis = -1 if interleaved else -2
    a, b = pairs.unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(axis)
    c, s = cos[positions][:, None], sin[positions][:, None]
    rotated = torch.stack([a * c - b * s, b * c + a * s], axis).flatten(-2)
    return torch.cat([rotated.to(x.dtype), rest], -1)


def rope_kv_append_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, ...]:
    """Plain PyTorch: copies of the caches and their scales as the op leaves them, and q rotated."""
    q, k = (rotate_ref(x, cos, sin, positions, interleaved=interleaved) for x in (q, k))
    return (*kv_append_ref(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale), q)
