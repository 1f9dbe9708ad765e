"""add_rms_norm_fp8_quantize: to the residual stream, and from there through a norm to e4m3."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .rms_norm_fp8_quantize import rms_norm_fp8_quantize_ref
from .silu_mul_fp8_quantize import empty_codes_and_scales

_op = ops.add_rms_norm_fp8_quantize.default


def add_rms_norm_fp8_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add x to the residual stream, and quantise the norm of the sum to e4m3.

    ``residual_out = x + residual``, rounded to their dtype; xq and scales are those of
    `rms_norm_fp8_quantize` for residual_out, to the bit. The time is that of reading x and residual
    and of writing residual_out.

    Args:
        x: [..., K], fp16, bf16 or fp32: what a block adds to the stream. Rows may have any strides:
            no copy is made unless neighbours in a row are apart.
        residual: [..., K], dtype of x and its shape, strides of its own.
        weight: [K], dtype of x, contiguous.
        scale: one element of any shape and float dtype, as [1] of fp32: a known scale of all rows
            ("static", of calibration); None: scales are found.
        eps: added to the mean of squares; finite, at least 0.
        group_size: 128, columns that share a scale, of which the last may be fewer; None is one
            scale per row.

    Returns:
        xq [..., K], e4m3 (torch.float8_e4m3fn), contiguous; scales in fp32, laid out as those of
        `fp8_quantize`: [..., ceil(K/128)], or [..., 1] without groups; by a known scale that scale,
        [1]; and residual_out [..., K], dtype of x, contiguous.

    Raises:
        RuntimeError: a wrong dtype, shape, stride or device, a wrong eps, another group size,
            groups beside a known scale, or a scale of several elements.

    Source:
        csrc/quant/rms_norm_rows.h. RMSNorm is of arXiv:1910.07467.
    """
    return _op(x, residual, weight, scale, eps=eps, group_size=group_size)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        x.shape == residual.shape,
        lambda: "add_rms_norm_fp8_quantize: residual must have the shape of x",
    )
    return *empty_codes_and_scales(x, scale, group_size), x.new_empty(x.shape)


refuse_backward(_op)


def add_rms_norm_fp8_quantize_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch."""
    out = (x.float() + residual.float()).to(x.dtype)
    codes, scales = rms_norm_fp8_quantize_ref(out, weight, scale, eps=eps, group_size=group_size)
    return codes, scales, out
