"""W4A8Linear: a linear layer with packed 4-bit weights, and inputs in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm import ops
from effllm.nn.linear import Int4Linear
from effllm.ops.int4_gemm import dequantize


class W4A8Linear(Int4Linear):
    """``Int4Linear`` whose x is rounded to int8 as well, each token by a scale of its own, max|x| /
    127, that is found at each call.

    Parameters and their shapes are those of ``Int4Linear``, and so is what ``effllm.save`` writes:
    a file says nothing of the inputs, and comes back as an ``Int4Linear``. Zero points must be at
    most 128. Gradients flow to ``x`` (LoRA) as if it had not been rounded, never to the weight.
    """

    _name = "a W4A8Linear"

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16, bf16 or fp32 -> ``[..., N]`` of x's dtype."""
        if self.perm is not None:
            x = x.index_select(-1, self.perm)
        tensors = (self.qweight, self.scales, self.zeros, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _RoundedProduct.apply(x, *tensors, self.group_size)
            return out
        return _rounded_product(x, *tensors, self.group_size)


def _rounded_product(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    codes, x_scales = ops.int8_quantize(x)
    return ops.w4a8_gemm(
        codes, x_scales, qweight, scales, zeros, bias, group_size=group_size, out_dtype=x.dtype
    )


class _RoundedProduct(torch.autograd.Function):
    """Backwards, rounding x counts as the identity (a straight-through estimate)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, *others: Any
    ) -> Tensor:
        ctx.save_for_backward(qweight, scales, zeros)
        ctx.k, ctx.group_size = x.shape[-1], others[-1]
        return _rounded_product(x, qweight, scales, zeros, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (qweight, scales, zeros) = grads, ctx.saved_tensors
        weight = dequantize(qweight, scales, zeros, ctx.k, ctx.group_size)
        return grad @ weight.to(grad.dtype), *[None] * 5
