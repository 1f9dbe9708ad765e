"""fp8_gemm: a linear layer of e4m3 activations over e4m3 weights."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops

_op = ops.fp8_gemm.default


def fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    accurate: bool = True,
) -> Tensor:
    """``(x * x_scales) @ (weight * w_scales).T + bias`` with codes of `fp8_quantize`.

    Granularities are told apart by the shapes of the scales, and mix: per tensor, per row of x and
    channel of the weight, per 1 x 128 of x and 128 x 128 of the weight. Scales apply to fp32 sums,
    of 128 columns where there are such groups or blocks, else of all; the result is rounded once. A
    NaN code or scale is NaN in the outputs that it is for. For few tokens the time is that of
    reading the N * K bytes of the weight.

    Args:
        x: [..., K], e4m3 (torch.float8_e4m3fn), any strides, any number of tokens.
        x_scales: one element, [..., 1] or [..., ceil(K/128)], any float dtype, as fp32. Any
            strides; those that `fp8_quantize` makes are read fastest.
        weight: [N, K], e4m3; rows may be strided. Rows at multiples of 16 bytes are read
            fastest, others are read right.
        w_scales: one element, [N, 1] or [ceil(N/128), ceil(K/128)], any float dtype, as fp32, any
            strides. The last blocks may be short.
        bias: [N], any float dtype, added before the only rounding.
        out_dtype: fp16, bf16 or fp32.
        accurate: Hopper's tensor cores keep some 14 bits of a sum of e4m3 products. True has them
            add 128 columns at most, 512 for bf16, and adds the rest in fp32 (all of it where
            ``out_dtype`` is fp32): in bf16 that is as good as fp32 sums. False lets them add all
            columns, which is faster for many tokens.

    Returns:
        [..., N] in out_dtype (fp16, bf16 or fp32), contiguous.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride.

    Source:
        csrc/gemm/fp8_gemm.h. Blocks of 128 are of DeepSeek-V3 (arXiv:2412.19437).
    """
    return _op(x, x_scales, weight, w_scales, bias, out_dtype=out_dtype, accurate=accurate)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    accurate: bool = True,
) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "fp8_gemm: x must be [..., K], got a scalar")
    torch._check(
        weight.dim() == 2, lambda: f"fp8_gemm: weight must be [N, K], got {list(weight.shape)}"
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


refuse_backward(_op)


def dequantize_weight(
    weight: Tensor, w_scales: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``weight * w_scales`` [N, K] in ``dtype``, computed in fp32 at least."""
    n, k = weight.shape
    wide = torch.promote_types(dtype, torch.float32)
    scales = w_scales.to(wide)
    if scales.numel() == 1:
        scales = scales.view(1, 1)
    elif scales.shape != (n, 1):
        scales = scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return (weight.to(wide) * scales).to(dtype)


def fp8_gemm_ref(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    accurate: bool = True,
) -> Tensor:
    """Plain PyTorch in float64, whatever ``out_dtype`` is: products first, then scales."""
    out = grouped_product(x, x_scales, weight, w_scales, torch.float64)
    return out if bias is None else out + bias.double()


def grouped_product(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, w_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """The definition in ``dtype``: sums, of 128 columns where scales have groups, times scales."""
    (n, k), groups = weight.shape, -(-weight.shape[1] // 128)
    rows = x.reshape(-1, k) if k else x.new_empty((*x.shape[:-1], 0)).flatten(0, -2)

    # As [M or 1, groups or 1] and [N or 1, groups or 1].
    x_factor = torch.ones(1, 1, dtype=dtype, device=x.device)
    if x_scales is not None:
        last = 1 if x_scales.numel() == 1 else x_scales.shape[-1]
        x_factor = x_scales.to(dtype).reshape(x_scales.numel() // max(last, 1), last)
    w_factor = w_scales.to(dtype)
    if w_factor.numel() == 1:
        w_factor = w_factor.view(1, 1)
    elif w_factor.shape != (n, 1):
        w_factor = w_factor.repeat_interleave(128, 0)[:n]

    out = torch.zeros(len(rows), n, dtype=dtype, device=x.device)
    one_sum = x_factor.shape[1] == w_factor.shape[1] == 1
    for group in range(1 if one_sum else groups):
        columns = slice(None) if one_sum else slice(128 * group, 128 * group + 128)
        sums = rows[:, columns].to(dtype) @ weight[:, columns].to(dtype).T
        x_column = x_factor[:, min(group, x_factor.shape[1] - 1), None]
        w_column = w_factor[:, min(group, w_factor.shape[1] - 1)]
        out += sums * x_column * w_column
    return out.view(*x.shape[:-1], n)
