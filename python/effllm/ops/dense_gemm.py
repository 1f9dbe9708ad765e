"""dense_gemm: a linear layer over weights that are not quantised."""

from typing import Any

import torch
from torch import Tensor

from .._load import ops

_op = ops.dense_gemm.default


def dense_gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, products and sums in fp32, rounded once.

    It exists to hold the library's own tiles, ring and epilogue against cuBLAS without anything
    quantised in between. Models are served as well by ``torch.nn.functional.linear``, which takes
    every shape and GPU.

    Args:
        x: [..., K], fp16 or bf16; fp32 on the CPU only. Any strides, any number of tokens.
        weight: [N, K] in the dtype of x; rows may be strided. On a GPU N and K must be multiples of
            8 and rows 16-byte aligned.
        bias: [N], any float dtype, added before the only rounding.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable in all three.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; on a GPU also a weight of other
            sizes or alignment, or a compute capability that is not 9.0.

    Source:
        csrc/gemm/dense_gemm.h. Persistent warp-specialised tiles as in CUTLASS 3; wgmma's rates
        as in arXiv:2402.13499.
    """
    return _op(x, weight, bias)


@torch.library.register_fake(_op.name())
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "dense_gemm: x must be [..., K], got a scalar")
    torch._check(
        weight.dim() == 2, lambda: f"dense_gemm: weight must be [N, K], got {list(weight.shape)}"
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias[0].dtype if bias and bias[0] is not None else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.flatten(0, -2)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ weight
    if ctx.needs_input_grad[1]:
        grad_weight = rows.T @ x.flatten(0, -2)
    if any(ctx.needs_input_grad[2:]):  # arguments left at their defaults are not listed
        grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias


torch.library.register_autograd(_op.name(), _backward, setup_context=_setup_context)


def dense_gemm_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch in float64."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()
