"""silu_mul_fp8_quantize: the middle of a gated MLP, silu(gate) * up, as e4m3 codes and scales."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .fp8_quantize import empty_scales, fp8_quantize_ref
from .fp8_quantize_tensor import fp8_quantize_tensor_ref

_op = ops.silu_mul_fp8_quantize.default


def silu_mul_fp8_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None = None, *, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise ``silu(gate) * up`` to e4m3: ``silu(gate) * up ~ xq * scales``.

    The product is that of a Hugging Face LlamaMLP: silu(g) = g / (1 + exp(-g)) is found in fp32 and
    rounded to the dtype of gate, and so is its product with up. Codes and scales are what
    `fp8_quantize` makes of it, NaN and infinity included, or `fp8_quantize_tensor` by a known
    scale. Bits are the same on every device: exp is the op's own, and silu errs by less than 2^-21
    (1 + |g| / 4) of itself before it is rounded; below -70 it is -0. The product never goes to
    memory: the time is that of reading gate and up.

    Args:
        gate: [..., K], fp16, bf16 or fp32. Rows may have any strides, so that gate and up can be
            halves of one tensor: no copy is made unless neighbours in a row are apart.
        up: [..., K], dtype of gate and its shape.
        scale: one element of any shape and float dtype, as [1] of fp32: a known scale of all rows
            ("static", of calibration); None: scales are found.
        group_size: 128, columns that share a scale, of which the last may be fewer; None is one
            scale per row.

    Returns:
        xq [..., K], e4m3 (torch.float8_e4m3fn), contiguous, and scales in fp32, laid out as those
        of `fp8_quantize`: [..., ceil(K/128)], or [..., 1] without groups; by a known scale that
        scale, [1].

    Raises:
        RuntimeError: a wrong dtype, shape or device, another group size, groups beside a known
            scale, or a scale of several elements.

    Source:
        csrc/quant/silu_mul_rows.h. Gated units with silu are of arXiv:2002.05202.
    """
    return _op(gate, up, scale, group_size=group_size)


def empty_codes_and_scales(
    x: Tensor, scale: Tensor | None, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Uninitialised results of an op that quantises something of x's shape."""
    torch._check(x.dim() >= 1, lambda: "x must be [..., K], got a scalar")
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    if scale is not None:
        return codes, x.new_empty(1, dtype=torch.float32)
    num_groups = 1 if group_size is None else (x.shape[-1] + group_size - 1) // group_size
    return codes, empty_scales(x, num_groups)


@torch.library.register_fake(_op.name())
def _fake(
    gate: Tensor, up: Tensor, scale: Tensor | None = None, *, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch._check(
        gate.shape == up.shape, lambda: "silu_mul_fp8_quantize: up must have the shape of gate"
    )
    return empty_codes_and_scales(gate, scale, group_size)


refuse_backward(_op)


def codes_and_scales_ref(
    y: Tensor, scale: Tensor | None, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: y by a known scale, or by those of its rows or groups."""
    if scale is not None:
        return fp8_quantize_tensor_ref(y, scale)
    return fp8_quantize_ref(y, group_size=group_size)


def silu_ref(g: Tensor) -> Tensor:
    """Plain PyTorch, fp32: silu by the op's exponential, 2^t = 2^n * 2^f, and its sigmoid."""
    # Tensors, lest the numbers be taken in float64.
    coefficients = g.new_tensor([0.0013264727, 0.009671513, 0.055507336, 0.24022242, 0.693147, 1.0])
    t = g.clamp(min=-80.0, max=44.0) * g.new_tensor(-1.442695)
    n = t.round()
    f = t - n
    power = coefficients[0] * f + coefficients[1]
    for coefficient in coefficients[2:]:
        power = power * f + coefficient
    power = (power.view(torch.int32) + (n.int() << 23)).view(torch.float32)
    sigmoid = 1 / ((1 + power).view(torch.int32) & ~1).view(torch.float32)
    return g * sigmoid.where(~(g < -70.0), 0.0)


def silu_mul_ref(gate: Tensor, up: Tensor) -> Tensor:
    """Plain PyTorch: silu(gate) * up, each rounded to the dtype of gate."""
    return (silu_ref(gate.float()).to(gate.dtype).float() * up.float()).to(gate.dtype)


def silu_mul_fp8_quantize_ref(
    gate: Tensor, up: Tensor, scale: Tensor | None = None, *, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch."""
    return codes_and_scales_ref(silu_mul_ref(gate, up), scale, group_size)
