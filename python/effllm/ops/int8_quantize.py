"""int8_quantize: rows as int8 codes and scales."""

import math

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .fp8_quantize import empty_scales

_op = ops.int8_quantize.default

MAX = 127.0
"""The largest code by a scale of the row itself."""


def int8_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise rows to int8, each with a scale of its own or all with a known one:
    ``x ~ xq * scales``.

    A scale of a row is max|x| / 127, at least 2^-126, and 1 for a row of zeros. Codes round
    x / scale to nearest even, and are the same bits on every device. A row with NaN or infinity
    gets the scale NaN and codes 0. By a known scale ("static", of calibration) what is beyond
    -128 .. 127 saturates, infinity too; there is no code for NaN, which becomes 0. The time is that
    of reading x.

    Args:
        x: [..., K], fp16, bf16 or fp32. Rows may have any strides: no copy is made unless
            neighbours in a row are apart.
        scale: one element of any shape and float dtype, as [1] of fp32; None is one scale per row.
            It should be positive and finite: by 0 everything saturates, by NaN all codes are 0.

    Returns:
        xq [..., K], int8, contiguous, and scales [..., 1], fp32; of a known scale that alone, [1].

    Raises:
        RuntimeError: a wrong dtype, device or rank, or a scale of several elements.

    Source:
        csrc/quant/int8_quantize.h. Scales per token are of SmoothQuant (arXiv:2211.10438).
    """
    return _op(x, scale)


@torch.library.register_fake(_op.name())
def empty_int8_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Uninitialised results of an op that quantises something of x's shape."""
    torch._check(x.dim() >= 1, lambda: "x must be [..., K], got a scalar")
    scales = empty_scales(x, 1) if scale is None else x.new_empty(1, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales


refuse_backward(_op)


def int8_quantize_ref(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch."""
    values = x.float()
    if scale is None:
        magnitude = x.new_zeros(*x.shape[:-1], 1, dtype=torch.float32)
        if x.shape[-1] > 0:
            magnitude = values.abs().amax(-1, keepdim=True)
        # The divisor is a tensor: torch multiplies by the reciprocal of a number, which rounds
        # twice.
        scales = magnitude / torch.full_like(magnitude, MAX)
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny).where(magnitude > 0, 1.0)
        scales = scales.where(magnitude < math.inf, math.nan)
    else:
        scales = scale.float().view(1)
    codes = (values / scales).nan_to_num(0.0, math.inf, -math.inf).where(~scales.isnan(), 0.0)
    return codes.round().clamp(-128, MAX).to(torch.int8), scales
