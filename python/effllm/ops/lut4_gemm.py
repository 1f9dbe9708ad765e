"""lut4_gemm: a linear layer over 4-bit codes into a codebook."""

from typing import Any

import torch
from torch import Tensor

from .._load import ops
from .int4_unpack import int4_unpack, int4_unpack_ref

_op = ops.lut4_gemm.default


def lut4_gemm(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    """``x @ W.T + bias`` with ``W[n, k] = codebook[..., code[n, k]] * scales[n, k // g]``.

    One codebook for all (as NF4), one per row, or one per group (as k-means makes them). Its values
    enter the product rounded to the dtype of x, which is exact if they have it; scales and sums are
    fp32 and the result is rounded once. For few tokens the time is that of reading the N * K / 2
    bytes of codes, and of the codebooks where each group has its own.

    Args:
        x: [..., K], fp16 or bf16; fp32 on the CPU only. Any strides, any number of tokens.
        qweight: int32 [ceil(N/64), ceil(K/64) * 512], codes 0..15 from `int4_pack`, 16-byte
            aligned; rows may be strided. What it holds past N and K is never looked up.
        codebook: [16], [N, 16] or [N, ceil(K/g), 16], any float dtype, any strides.
        scales: [N, ceil(K/g)], any float dtype, any strides; None means 1.
        bias: [N], any float dtype, added before the only rounding.
        group_size: g, columns that share a scale or a codebook: 32, 64, 128 or K, also where
            neither has groups. The last group may be short.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable in x and bias. N is that of the
        codebook, the scales or the bias; if none of them has it, it is 64 times the rows of qweight
        (`codebook.expand(N, 16)` costs nothing and says it).

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or group size; or a codebook or scales that
            require a gradient.

    Source:
        csrc/gemm/lut4_gemm.h. NF4 is of QLoRA (arXiv:2305.14314), codebooks by k-means are of
        SqueezeLLM (arXiv:2306.07629).
    """
    return _op(x, qweight, codebook, scales, bias, group_size=group_size)


def num_rows(
    qweight: Tensor, codebook: Tensor, scales: Tensor | None, bias: Tensor | None = None
) -> int:
    """N as the op takes it: of the first argument that has it."""
    if codebook.dim() > 1:
        return codebook.shape[0]
    if scales is not None and scales.dim() > 0:
        return scales.shape[0]
    if bias is not None and bias.dim() > 0:
        return bias.shape[0]
    return 64 * qweight.shape[0]


def decode(
    codes: Tensor, codebook: Tensor, scales: Tensor | None = None, *, group_size: int
) -> Tensor:
    """``codebook[..., code] * scale`` of codes uint8 [N, K]: float64 for a float64 codebook, else
    fp32. The codebook is taken as it is given, unrounded."""
    dtype = torch.float64 if codebook.dtype == torch.float64 else torch.float32
    n, k = codes.shape
    indices, table = codes.long(), codebook.to(dtype)
    if codebook.dim() == 1:
        weight = table[indices]
    elif codebook.dim() == 2:
        weight = table.gather(1, indices)
    else:
        rows = torch.arange(n, device=codes.device).unsqueeze(1)
        groups = torch.arange(k, device=codes.device) // group_size
        weight = table[rows, groups, indices]
    if scales is None:
        return weight
    return weight * scales.to(dtype).repeat_interleave(group_size, dim=1)[:, :k]


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "lut4_gemm: x must be [..., K], got a scalar")
    torch._check(
        1 <= codebook.dim() <= 3,
        lambda: (
            "lut4_gemm: codebook must be [16], [N, 16] or [N, ceil(K/g), 16], "
            f"got {list(codebook.shape)}"
        ),
    )
    return x.new_empty((*x.shape[:-1], num_rows(qweight, codebook, scales, bias)))


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Tensor
) -> None:
    x, qweight, codebook, scales, bias = inputs
    for name, tensor in (("codebook", codebook), ("scales", scales)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"effllm::lut4_gemm: {name} must not require a gradient, got requires_grad=True: "
                "only x and bias are differentiable, the quantised weight (qweight, codebook, "
                "scales) is frozen"
            )
    ctx.save_for_backward(qweight, codebook, scales)
    ctx.n, ctx.k = output.shape[-1], x.shape[-1]
    ctx.group_size = keyword_only_inputs["group_size"]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, codebook, scales = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes = int4_unpack(qweight, ctx.n, ctx.k)
        # Rounded as in the forward pass: the gradient has the dtype of x.
        weight = decode(codes, codebook.to(grad.dtype), scales, group_size=ctx.group_size)
        grad_x = grad @ weight.to(grad.dtype)
    if any(ctx.needs_input_grad[4:]):  # arguments left at their defaults are not listed
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias


torch.library.register_autograd(_op.name(), _backward, setup_context=_setup_context)


def lut4_gemm_ref(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    """Plain PyTorch in float64, independent of the library's own code, also of unpacking."""
    codes = int4_unpack_ref(qweight, num_rows(qweight, codebook, scales, bias), x.shape[-1])
    # A float64 x comes from tests that want the weight itself.
    table = codebook.double() if x.dtype == torch.float64 else codebook.to(x.dtype).double()
    out = x.double() @ decode(codes, table, scales, group_size=group_size).T
    return out if bias is None else out + bias.double()
