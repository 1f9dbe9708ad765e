"""w4a8_gemm: a linear layer of int8 activations over 4-bit weights."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .int4_gemm import dequantize_codes
from .int4_unpack import int4_unpack_ref
from .int8_gemm import int8_gemm_ref

_op = ops.w4a8_gemm.default

MAX_ZERO = 128
"""The largest zero point by which a code less it is an int8."""

MAX_MULTIPLIER = 15
"""The largest of the integers that scale a group, beside a scale of the whole row."""


def w4a8_gemm(
    x: Tensor,
    x_scales: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    multipliers: Tensor | None = None,
    *,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """``(x * x_scales) @ W.T + bias`` with codes of `int8_quantize` and the weights of `int4_gemm`:
    ``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]``, or, by two levels of scales,
    those of groups integers, ``W[n, k] = (q[n, k] - 8) * multipliers[n, k // g] * scales[n]``.

    Sums of integer products are exact within a group, with multipliers over all of K. With these or
    one group, g = K, the result is the same bits on every device: those of `int8_gemm` over
    ``(q - 8) * multipliers`` or ``q - zeros``. With more groups, each sum is multiplied
    by its scale and they are added in fp32: on the CPU, whose results do not depend on the batch,
    from the first to the last, on a GPU in an order that depends on the number of tokens. The sum
    is multiplied by the row's scale, the bias is added, and the result rounded once more. For few
    tokens the time is that of reading the N * K / 2 bytes of codes. For many, multipliers are the
    faster way to scale groups: a code is multiplied by an integer before all tokens meet it.

    Args:
        x: [..., K], int8, columns in order, any strides, any number of tokens.
        x_scales: one element or [..., 1], any float dtype, as fp32, any strides.
        qweight: int32 [ceil(N/64), ceil(K/64) * 512] from `int4_pack`, 16-byte aligned; rows may be
            strided.
        scales: [N, ceil(K/g)], with multipliers [N, 1], any float dtype, as bf16, any strides.
        zeros: uint8 [N, ceil(K/g)], zero points of 0 .. 128; None means 8. A GPU takes larger ones
            for 128.
        bias: [N], any float dtype.
        multipliers: uint8 [N, ceil(K/g)], of 0 .. 15, any strides; zeros must be None beside them.
            A GPU takes the low four bits of larger ones.
        group_size: g, columns that share a scale: 32, 64, 128 or K. The last group may be short.
        out_dtype: fp16, bf16 or fp32.

    Returns:
        [..., N] in out_dtype (fp16, bf16 or fp32), contiguous.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or group size; on a CPU, a zero point over
            128 or a multiplier over 15; a K over 131071 in one group or with multipliers, whose
            sums could overflow int32.

    Source:
        csrc/gemm/w4a8_gemm.h. With multipliers the format is QServe's W4A8 (arXiv:2405.04532) with
        8 for its zero points: by an integer within a group, for which two codes or more share an
        instruction (LiquidGEMM, arXiv:2509.01229), and by a float for each row.
    """
    weights = (qweight, scales, zeros, bias, multipliers)
    return _op(x, x_scales, *weights, group_size=group_size, out_dtype=out_dtype)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor,
    x_scales: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    multipliers: Tensor | None = None,
    *,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "w4a8_gemm: x must be [..., K], got a scalar")
    torch._check(
        scales.dim() == 2, lambda: f"w4a8_gemm: scales must be [N, ceil(K/g)], got {scales.shape}"
    )
    return x.new_empty((*x.shape[:-1], scales.shape[0]), dtype=out_dtype)


refuse_backward(_op)


def w4a8_gemm_ref(
    x: Tensor,
    x_scales: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    multipliers: Tensor | None = None,
    *,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch, independent of the library's own code: with one group or multipliers to the
    bit in ``out_dtype``, else the exact result in float64."""
    codes = int4_unpack_ref(qweight, scales.shape[0], x.shape[-1])
    if multipliers is not None:
        weight = dequantize_codes(codes, multipliers.double(), None, group_size=group_size)
        return int8_gemm_ref(x, x_scales, weight, scales, bias, out_dtype=out_dtype)
    if scales.shape[1] == 1:
        weight = codes.double() - (8 if zeros is None else zeros.double())
        return int8_gemm_ref(x, x_scales, weight, scales, bias, out_dtype=out_dtype)
    weight = dequantize_codes(codes, scales.double(), zeros, group_size=group_size)
    rows = x.double() * (x_scales.reshape(1) if x_scales.numel() == 1 else x_scales).double()
    out = rows @ weight.T
    return out if bias is None else out + bias.double()
