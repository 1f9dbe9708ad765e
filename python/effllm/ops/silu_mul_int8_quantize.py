"""silu_mul_int8_quantize: the middle of a gated MLP, silu(gate) * up, as int8 codes and scales."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .int8_quantize import empty_int8_rows, int8_quantize_ref
from .silu_mul_fp8_quantize import silu_mul_ref

_op = ops.silu_mul_int8_quantize.default


def silu_mul_int8_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise ``silu(gate) * up`` to int8: ``silu(gate) * up ~ xq * scales``.

    The product is that of `silu_mul_fp8_quantize`, to the bit; codes and scales are what
    `int8_quantize` makes of it, with or without a known scale, NaN and infinity included. The
    product never goes to memory: the time is that of reading gate and up.

    Args:
        gate: [..., K], fp16, bf16 or fp32. Rows may have any strides, so that gate and up can be
            halves of one tensor: no copy is made unless neighbours in a row are apart.
        up: [..., K], dtype of gate and its shape.
        scale: one element of any shape and float dtype, as [1] of fp32: a known scale of all rows
            ("static", of calibration); None: one per row.

    Returns:
        xq [..., K], int8, contiguous, and scales [..., 1], fp32; of a known scale that alone, [1].

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a scale of several elements.

    Source:
        csrc/quant/silu_mul_rows.h. Gated units with silu are of arXiv:2002.05202.
    """
    return _op(gate, up, scale)


@torch.library.register_fake(_op.name())
def _fake(gate: Tensor, up: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    torch._check(
        gate.shape == up.shape, lambda: "silu_mul_int8_quantize: up must have the shape of gate"
    )
    return empty_int8_rows(gate, scale)


refuse_backward(_op)


def silu_mul_int8_quantize_ref(
    gate: Tensor, up: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch."""
    return int8_quantize_ref(silu_mul_ref(gate, up), scale)
