"""add_rms_norm_int8_quantize: to the residual stream, and from there through a norm to int8."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .int8_quantize import empty_int8_rows
from .rms_norm_int8_quantize import rms_norm_int8_quantize_ref

_op = ops.add_rms_norm_int8_quantize.default


def add_rms_norm_int8_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Add x to the residual stream, and quantise the norm of the sum to int8.

    ``residual_out = x + residual``, rounded to their dtype; xq and scales are those of
    `rms_norm_int8_quantize` for residual_out, to the bit. The time is that of reading x and
    residual and of writing residual_out.

    Args:
        x: [..., K], fp16, bf16 or fp32: what a block adds to the stream. Rows may have any strides:
            no copy is made unless neighbours in a row are apart.
        residual: [..., K], dtype of x and its shape, strides of its own.
        weight: [K], dtype of x, contiguous.
        scale: one element of any shape and float dtype, as [1] of fp32: a known scale of all rows
            ("static", of calibration); None: one per row.
        eps: added to the mean of squares; finite, at least 0.

    Returns:
        xq [..., K], int8, contiguous; scales [..., 1], fp32, of a known scale that alone, [1]; and
        residual_out [..., K], dtype of x, contiguous.

    Raises:
        RuntimeError: a wrong dtype, shape, stride or device, a wrong eps, or a scale of several
            elements.

    Source:
        csrc/quant/rms_norm_rows.h. RMSNorm is of arXiv:1910.07467.
    """
    return _op(x, residual, weight, scale, eps=eps)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        x.shape == residual.shape,
        lambda: "add_rms_norm_int8_quantize: residual must have the shape of x",
    )
    return *empty_int8_rows(x, scale), x.new_empty(x.shape)


refuse_backward(_op)


def add_rms_norm_int8_quantize_ref(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch."""
    out = (x.float() + residual.float()).to(x.dtype)
    codes, scales = rms_norm_int8_quantize_ref(out, weight, scale, eps=eps)
    return codes, scales, out
