"""int8_weight_gemm: a linear layer of 16-bit activations over int8 weights (W8A16)."""

from typing import Any

import torch
from torch import Tensor

from .._load import ops

_op = ops.int8_weight_gemm.default

GROUP = 128
"""Columns that share a scale where there are groups."""


def int8_weight_gemm(
    x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x @ (weight * w_scales).T + bias``: only the weight is quantised.

    Half the bytes of a 16-bit weight at its speed of arithmetic. Codes are exact in the dtype of x;
    scales apply to fp32 sums, of 128 columns where there are groups, and the result is rounded
    once. For few tokens the time is that of reading the N * K bytes of the weight.

    Args:
        x: [..., K], fp16 or bf16; fp32 on the CPU only. Any strides, any number of tokens.
        weight: [N, K], int8; rows may be strided. Rows at multiples of 16 bytes are read fastest,
            others are read right.
        w_scales: one element, [N, 1] or [N, ceil(K/128)], any float dtype, as fp32, any strides.
            The last group may be short.
        bias: [N], any float dtype, added before the only rounding.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable in x and bias.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or scales that require a
            gradient.

    Source:
        csrc/gemm/int8_weight_gemm.h. Weights of 8 bits alone are of LLM.int8() (arXiv:2208.07339)
        and ZeroQuant (arXiv:2206.01861).
    """
    return _op(x, weight, w_scales, bias)


@torch.library.register_fake(_op.name())
def _fake(x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "int8_weight_gemm: x must be [..., K], got a scalar")
    torch._check(
        weight.dim() == 2,
        lambda: f"int8_weight_gemm: weight must be [N, K], got {list(weight.shape)}",
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def dequantize_groups(
    weight: Tensor, w_scales: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``weight * w_scales`` [N, K] in ``dtype``, computed in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    scales = w_scales.to(wide)
    if scales.numel() == 1:
        scales = scales.view(1, 1)
    elif scales.shape[1] != 1:
        scales = scales.repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    return (weight.to(wide) * scales).to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, w_scales, *bias = inputs  # arguments left at their defaults are not listed
    if w_scales.requires_grad:
        raise RuntimeError(
            "effllm::int8_weight_gemm: w_scales must not require a gradient, got "
            "requires_grad=True: only x and bias are differentiable, the quantised weight is frozen"
        )
    ctx.save_for_backward(weight, w_scales)
    ctx.bias_dtype = bias[0].dtype if bias and bias[0] is not None else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, w_scales = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize_groups(weight, w_scales, grad.dtype)
    if any(ctx.needs_input_grad[3:]):
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias


torch.library.register_autograd(_op.name(), _backward, setup_context=_setup_context)


def int8_weight_gemm_ref(
    x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Plain PyTorch in float64."""
    out = x.double() @ dequantize_groups(weight, w_scales, torch.float64).T
    return out if bias is None else out + bias.double()
