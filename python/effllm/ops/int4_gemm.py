"""int4_gemm: a linear layer over 4-bit weights."""

from typing import Any

import torch
from torch import Tensor

from .._load import ops
from .int4_unpack import int4_unpack, int4_unpack_ref

_op = ops.int4_gemm.default


def int4_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    """``x @ W.T + bias`` with ``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]``.

    The codes are exact in the multiplier, scales and sums are fp32; the result is rounded once. A
    Hopper GPU may round the weights to the dtype of x, too, for more than 32 tokens: within those
    limits results there depend on the number of tokens. For few of them the time is that of reading
    the N * K / 2 bytes of codes. On a CPU a token's result does not depend, to the bit, on the
    tokens beside it; it does depend on the processor: one with AVX-512 BF16 multiplies bf16 x in
    pairs, with numbers below 2^-126 taken as zero.

    Args:
        x: [..., K], fp16 or bf16; fp32 on the CPU only. Any strides, any number of tokens.
        qweight: int32 [ceil(N/64), ceil(K/64) * 512] from `int4_pack`, 16-byte aligned; rows may be
            strided.
        scales: [N, ceil(K/g)], any float dtype, any strides.
        zeros: uint8 [N, ceil(K/g)], zero points; None means 8.
        bias: [N], any float dtype, added before the only rounding.
        perm: int32 [K], a permutation: column k of the codes goes with ``x[..., perm[k]]``, as
            GPTQ's act-order leaves weights. A GPU clamps entries out of range. On Hopper up to 8
            tokens are gathered as they are loaded, more in a pass of their own.
        group_size: g, columns that share a scale: 32, 64, 128 or K. The last group may be short.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable in x and bias.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or group size; on a CPU, a perm with an
            entry outside 0 .. K - 1; or scales that require a gradient.

    Source:
        csrc/gemm/int4_gemm.h. Group-wise 4-bit weights as in GPTQ (arXiv:2210.17323), kept in
        tensor-core order as in Marlin (arXiv:2408.11743).
    """
    return _op(x, qweight, scales, zeros, bias, perm, group_size=group_size)


def dequantize(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, k: int, group_size: int
) -> Tensor:
    """The weight as the op sees it, fp32 [N, K]: what int4_gemm multiplies x by."""
    codes = int4_unpack(qweight, scales.shape[0], k)
    return dequantize_codes(codes, scales, zeros, group_size=group_size)


def dequantize_codes(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int,
    middle: int = 8,
) -> Tensor:
    """``(codes - zeros) * scales`` of codes uint8 [N, K]: float64 for float64 scales, else fp32.
    Without zeros the code ``middle`` stands for 0."""
    dtype = torch.float64 if scales.dtype == torch.float64 else torch.float32
    k = codes.shape[1]

    def spread(groups: Tensor) -> Tensor:
        return groups.to(dtype).repeat_interleave(group_size, dim=1)[:, :k]

    offset = middle if zeros is None else spread(zeros)
    return (codes.to(dtype) - offset) * spread(scales)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "int4_gemm: x must be [..., K], got a scalar")
    torch._check(
        scales.dim() == 2, lambda: f"int4_gemm: scales must be [N, ceil(K/g)], got {scales.shape}"
    )
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Tensor
) -> None:
    # Arguments left at their defaults are not listed.
    x, qweight, scales, zeros, bias, perm = (*inputs, *(None,) * 3)[:6]
    if scales.requires_grad:
        raise RuntimeError(
            "effllm::int4_gemm: scales must not require a gradient, got requires_grad=True: only x "
            "and bias are differentiable, the quantised weight (qweight, scales, zeros) is frozen"
        )
    ctx.save_for_backward(qweight, scales, zeros, perm)
    ctx.k, ctx.group_size = x.shape[-1], keyword_only_inputs["group_size"]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales, zeros, perm = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = dequantize(qweight, scales, zeros, ctx.k, ctx.group_size)
        # In the gradient's dtype, as a dense layer of that dtype would do it.
        grad_x = grad @ weight.to(grad.dtype)
        if perm is not None:
            grad_x = torch.zeros_like(grad_x).index_add_(-1, perm, grad_x)
    if any(ctx.needs_input_grad[4:]):
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None


torch.library.register_autograd(_op.name(), _backward, setup_context=_setup_context)


def int4_gemm_ref(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    """Plain PyTorch in float64, independent of the library's own code, also of unpacking."""
    codes = int4_unpack_ref(qweight, scales.shape[0], x.shape[-1])
    x = x if perm is None else x[..., perm.long()]
    out = x.double() @ dequantize_codes(codes, scales.double(), zeros, group_size=group_size).T
    return out if bias is None else out + bias.double()
