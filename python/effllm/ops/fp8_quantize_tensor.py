"""fp8_quantize_tensor: a tensor as e4m3 codes with one scale."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .fp8_quantize import MAX, quantize_groups

_op = ops.fp8_quantize_tensor.default


def fp8_quantize_tensor(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise to e4m3 with one scale, that of x or a known one: ``x ~ xq * scale``.

    The scale of x is max|x| / 448 as in `fp8_quantize`, over all of x: NaN or infinity anywhere
    makes it NaN, and all codes 0. By a known scale ("static", of calibration) codes are what x /
    scale is: what is beyond 448 saturates, infinity too, and NaN becomes the code NaN. Bits are the
    same on every device. The time is that of reading x, without a known scale twice.

    Args:
        x: [...], fp16, bf16 or fp32, any strides.
        scale: one element of any shape and float dtype, as [1] of fp32; None means that of x. It
            should be positive and finite: by 0 everything saturates, by NaN all codes are 0.

    Returns:
        xq [...], e4m3 (torch.float8_e4m3fn), contiguous, and the scale in use, [1] in fp32.

    Raises:
        RuntimeError: a wrong dtype or device, or a scale of several elements.

    Source:
        csrc/quant/fp8_quantize_tensor.h. E4M3 is of arXiv:2209.05433.
    """
    return _op(x, scale)


@torch.library.register_fake(_op.name())
def _fake(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(1, dtype=torch.float32)


refuse_backward(_op)


def fp8_quantize_tensor_ref(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch."""
    if scale is not None:
        used = scale.float().view(1)
        steps = (x.float() / used).where(~used.isnan(), 0.0)
        return steps.clamp(-MAX, MAX).to(torch.float8_e4m3fn), used
    if x.numel() == 0:
        return x.to(torch.float8_e4m3fn), torch.ones(1, device=x.device)
    codes, used = quantize_groups(x.flatten())
    return codes.view(x.shape), used
