"""rms_norm_int8_quantize: the norm before a linear layer, as int8 codes and scales."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .int8_quantize import empty_int8_rows, int8_quantize_ref
from .rms_norm_fp8_quantize import rms_norm_ref

_op = ops.rms_norm_int8_quantize.default


def rms_norm_int8_quantize(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Quantise ``rms_norm(x) * weight`` to int8: ``rms_norm(x) * weight ~ xq * scales``.

    The norm is that of `rms_norm_fp8_quantize`, to the bit; codes and scales are what
    `int8_quantize` makes of it, with or without a known scale, NaN and infinity included. The norm
    never goes to memory: the time is that of reading x.

    Args:
        x: [..., K], fp16, bf16 or fp32. Rows may have any strides: no copy is made unless
            neighbours in a row are apart.
        weight: [K], dtype of x, contiguous.
        scale: one element of any shape and float dtype, as [1] of fp32: a known scale of all rows
            ("static", of calibration); None: one per row.
        eps: added to the mean of squares; finite, at least 0.

    Returns:
        xq [..., K], int8, contiguous, and scales [..., 1], fp32; of a known scale that alone, [1].

    Raises:
        RuntimeError: a wrong dtype, shape, stride or device, a wrong eps, or a scale of several
            elements.

    Source:
        csrc/quant/rms_norm_rows.h. RMSNorm is of arXiv:1910.07467, scales per token are of
        SmoothQuant (arXiv:2211.10438).
    """
    return _op(x, weight, scale, eps=eps)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    return empty_int8_rows(x, scale)


refuse_backward(_op)


def rms_norm_int8_quantize_ref(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch."""
    return int8_quantize_ref(rms_norm_ref(x, weight, eps), scale)
