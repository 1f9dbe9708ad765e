"""fp8_quantize: rows, or groups of 128 columns, as e4m3 codes and scales."""

import math

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops

_op = ops.fp8_quantize.default

MAX = 448.0
"""The largest e4m3."""


def fp8_quantize(x: Tensor, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3 with scales of their own: ``x ~ xq * scales``, group by group.

    A scale is max|x| / 448 over its group, at least 2^-126, and 1 for a group of zeros. Codes round
    x / scale to nearest even, saturate at 448, and are the same bits on every device. A group with
    NaN or infinity gets the scale NaN and codes 0: no NaN code is ever stored. The time is that of
    reading x.

    Args:
        x: [..., K], fp16, bf16 or fp32. Rows may have any strides: no copy is made unless
            neighbours in a row are apart.
        group_size: 128, columns that share a scale, of which the last may be fewer; None is one
            scale per row.

    Returns:
        xq [..., K], e4m3 (torch.float8_e4m3fn), contiguous, and scales [..., ceil(K/128)], fp32, or
        [..., 1] without groups. In memory the scales of a group lie beside each other for all M
        rows: [ceil(K/128), M], each such row padded to a multiple of 16 bytes, as `fp8_gemm` reads
        them.

    Raises:
        RuntimeError: a wrong dtype or rank, or another group size.

    Source:
        csrc/quant/fp8_quantize.h. E4M3 is of arXiv:2209.05433, groups of 128 are of DeepSeek-V3
        (arXiv:2412.19437).
    """
    return _op(x, group_size=group_size)


def empty_scales(x: Tensor, num_groups: int) -> Tensor:
    """Uninitialised scales of the rows of x, as `fp8_quantize` lays them out."""
    rows = x.shape[:-1]
    num_rows = math.prod(rows)
    padded = x.new_empty((num_groups, (num_rows + 3) // 4 * 4), dtype=torch.float32)
    return padded[:, :num_rows].T.view(*rows, num_groups)


@torch.library.register_fake(_op.name())
def _fake(x: Tensor, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() >= 1, lambda: "fp8_quantize: x must be [..., K], got a scalar")
    num_groups = 1 if group_size is None else (x.shape[-1] + group_size - 1) // group_size
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), empty_scales(x, num_groups)


refuse_backward(_op)


def quantize_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: e4m3 codes [..., E] and fp32 scales [..., 1] of groups [..., E]."""
    values = groups.float()
    magnitude = values.abs().amax(-1, keepdim=True)
    finite = magnitude < math.inf
    # The divisor is a tensor: torch multiplies by the reciprocal of a number, which rounds twice.
    scales = magnitude / torch.full_like(magnitude, MAX)
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny).where(magnitude > 0, 1.0)
    codes = (values / scales).where(finite, 0.0).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
    return codes, scales.where(finite, math.nan)


def fp8_quantize_ref(x: Tensor, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: the last group is filled up with zeros, which change no maximum."""
    k = x.shape[-1]
    group = max(k, 1) if group_size is None else group_size
    num_groups = 1 if group_size is None else -(-k // group)
    padded = torch.nn.functional.pad(x, (0, num_groups * group - k))
    codes, scales = quantize_groups(padded.view(*x.shape[:-1], num_groups, group))
    return codes.flatten(-2)[..., :k].contiguous(), scales.squeeze(-1)
