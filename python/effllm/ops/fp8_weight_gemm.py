"""fp8_weight_gemm: a linear layer of 16-bit activations over e4m3 weights (W8A16)."""

from typing import Any

import torch
from torch import Tensor

from .._load import ops
from .fp8_gemm import dequantize_weight, grouped_product

_op = ops.fp8_weight_gemm.default


def fp8_weight_gemm(
    x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x @ (weight * w_scales).T + bias``: only the weight is quantised.

    For layers whose activations must stay wide, and GPUs without fp8 tensor cores: half the bytes
    of a 16-bit weight at its speed of arithmetic. e4m3 is exact in the dtype of x; scales apply to
    fp32 sums as in `fp8_gemm`, and the result is rounded once.

    Args:
        x: [..., K], fp16 or bf16; fp32 on the CPU only. Any strides, any number of tokens.
        weight: [N, K], e4m3 (torch.float8_e4m3fn); rows may be strided. Rows at multiples of 16
            bytes are read fastest, others are read right.
        w_scales: one element, [N, 1] or [ceil(N/128), ceil(K/128)], any float dtype, as fp32, any
            strides. The last blocks may be short.
        bias: [N], any float dtype, added before the only rounding.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable in x and bias.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or a weight or scales that
            require a gradient.

    Source:
        csrc/gemm/fp8_weight_gemm.h. E4M3 is of arXiv:2209.05433.
    """
    return _op(x, weight, w_scales, bias)


@torch.library.register_fake(_op.name())
def _fake(x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "fp8_weight_gemm: x must be [..., K], got a scalar")
    torch._check(
        weight.dim() == 2,
        lambda: f"fp8_weight_gemm: weight must be [N, K], got {list(weight.shape)}",
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, w_scales, *bias = inputs  # arguments left at their defaults are not listed
    for name, tensor in (("weight", weight), ("w_scales", w_scales)):
        if tensor.requires_grad:
            raise RuntimeError(
                f"effllm::fp8_weight_gemm: {name} must not require a gradient, got "
                "requires_grad=True: only x and bias are differentiable, the quantised weight is "
                "frozen"
            )
    ctx.save_for_backward(weight, w_scales)
    ctx.bias_dtype = bias[0].dtype if bias and bias[0] is not None else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, w_scales = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize_weight(weight, w_scales, grad.dtype)
    if any(ctx.needs_input_grad[3:]):
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias


torch.library.register_autograd(_op.name(), _backward, setup_context=_setup_context)


def fp8_weight_gemm_ref(
    x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Plain PyTorch in float64: products first, then scales."""
    out = grouped_product(x, None, weight, w_scales, torch.float64)
    return out if bias is None else out + bias.double()
