"""int8_gemm: a linear layer of int8 activations over int8 weights."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops

_op = ops.int8_gemm.default


def int8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    x_zeros: Tensor | None = None,
    w_sums: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """``((x - x_zeros) * x_scales) @ (weight * w_scales).T + bias`` with codes of `int8_quantize`.

    Scales are per row of x or one for all, per channel of the weight or one for all. Sums of
    products are exact; they are rounded to fp32, multiplied by ``w_scale * x_scale``, and the bias
    is added, each step rounded to fp32, the result once to ``out_dtype``: the same bits on every
    device. For few tokens the time is that of reading the N * K bytes of the weight.

    Args:
        x: [..., K], int8, any strides, any number of tokens.
        x_scales: one element or [..., 1], any float dtype, as fp32, any strides.
        weight: [N, K], int8; rows may be strided. Rows at multiples of 16 bytes are read fastest,
            others are read right.
        w_scales: one element or [N, 1], any float dtype, as fp32, any strides.
        bias: [N], any float dtype.
        x_zeros: one element or [..., 1], int8: the code that stands for 0, of asymmetric
            activations. The correction is a product with the sums of the weight's rows.
        w_sums: [N], int32, these sums, ``weight.sum(1, dtype=torch.int32)``, which a layer has
            once. Without them they are found anew: a pass over the weight.
        out_dtype: fp16, bf16 or fp32.

    Returns:
        [..., N] in out_dtype (fp16, bf16 or fp32), contiguous.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; w_sums without x_zeros; a K over
            131071, with x_zeros over 65793, whose sums could overflow int32.

    Source:
        csrc/gemm/int8_gemm.h. The format is SmoothQuant's (arXiv:2211.10438).
    """
    return _op(x, x_scales, weight, w_scales, bias, x_zeros, w_sums, out_dtype=out_dtype)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    x_zeros: Tensor | None = None,
    w_sums: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "int8_gemm: x must be [..., K], got a scalar")
    torch._check(
        weight.dim() == 2, lambda: f"int8_gemm: weight must be [N, K], got {list(weight.shape)}"
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


refuse_backward(_op)


def _for_rows(values: Tensor) -> Tensor:
    """One for all in whatever shape, or [..., 1], to broadcast over rows."""
    return values.reshape(1) if values.numel() == 1 else values


def int8_gemm_ref(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    x_zeros: Tensor | None = None,
    w_sums: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch to the bit, whatever w_sums are. Sums are of float64, which holds them exactly:
    products are below 2^16 and K below 2^17."""
    codes = x.double()
    if x_zeros is not None:
        codes = codes - _for_rows(x_zeros).double()
    sums = (codes @ weight.double().T).float()
    # One operation at a time: none is fused with the next.
    scales = _for_rows(x_scales).float() * w_scales.float().flatten()
    out = sums * scales
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)
