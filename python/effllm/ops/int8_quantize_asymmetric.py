"""int8_quantize_asymmetric: rows as int8 codes, scales and zero points."""

import math

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .fp8_quantize import empty_scales

_op = ops.int8_quantize_asymmetric.default


def int8_quantize_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise rows to int8, each with a scale and a zero point of its own:
    ``x ~ (xq - zeros) * scales``.

    All 256 codes are for the range of the row, widened to hold 0, of which the zero point is the
    code: rows that lie to one side of 0 get steps half as large as by `int8_quantize`. A scale is
    (max - min) / 255, at least 2^-126, the zero point round(-min / scale) - 128, codes are
    round(x / scale) + zero, bounded by -128 and 127; halves are rounded to even. A row of zeros has
    the scale 1, a row with NaN or infinity the scale NaN, both the zero point 0 and codes 0. The
    same bits on every device. The time is that of reading x.

    Args:
        x: [..., K], fp16, bf16 or fp32. Rows may have any strides: no copy is made unless
            neighbours in a row are apart.

    Returns:
        xq [..., K], int8, contiguous; scales [..., 1], fp32; zeros [..., 1], int8, contiguous: what
        `int8_gemm` takes for x, x_scales and x_zeros.

    Raises:
        RuntimeError: a wrong dtype or rank.

    Source:
        csrc/quant/int8_quantize_asymmetric.h. Zero points are those of Jacob et al.
        (arXiv:1712.05877).
    """
    return _op(x)


@torch.library.register_fake(_op.name())
def _fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() >= 1, lambda: "int8_quantize_asymmetric: x must be [..., K], got a scalar")
    zeros = x.new_empty((*x.shape[:-1], 1), dtype=torch.int8)
    return x.new_empty(x.shape, dtype=torch.int8), empty_scales(x, 1), zeros


refuse_backward(_op)


def int8_quantize_asymmetric_ref(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, in float64 but for the roundings that the definition has."""
    values = x.double()
    low = high = values.new_zeros((*x.shape[:-1], 1))
    if x.shape[-1] > 0:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    finite = torch.isfinite(high - low)
    low, high = low.clamp(max=0).where(finite, 0.0), high.clamp(min=0).where(finite, 0.0)
    # Rounded to fp32 as if it had no largest number, and then divided.
    span = ((high - low) / 2).float() / torch.full_like(low, 127.5, dtype=torch.float32)
    scales = span.clamp(min=torch.finfo(torch.float32).tiny).where(high > low, 1.0)
    zeros = (-low.float() / scales).round() - 128
    zeros = zeros.where(high > low, 0.0)
    codes = (values.float().where(finite, 0.0) / scales).round() + zeros
    codes = codes.clamp(-128, 127).to(torch.int8)
    return codes, scales.where(finite, math.nan), zeros.to(torch.int8)
