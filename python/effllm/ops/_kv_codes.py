"""Quantised rows of a KV cache in plain PyTorch, as csrc/quant/kv_layout.h defines them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUANTIZED_KV = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
"""Cache dtypes by the names of result rows. int4 lies in bytes, two codes each."""
_LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_FP16_MAX = 65504.0


def codes_per_row(dim: int, kv_dtype: torch.dtype) -> int:
    """Elements of a cache row that hold D = `dim` numbers."""
    return dim // 2 if kv_dtype == torch.uint8 else dim


def empty_kv_scale(
    pages: int, heads: int, page_size: int, kv_dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Uninitialised scales, logical [NP, P, HKV] (fp32) or [NP, P, HKV, 2] (fp16, int4), in memory
    [NP, HKV, P]."""
    shape = (pages, heads, page_size)
    if kv_dtype == torch.uint8:
        return torch.empty(*shape, 2, dtype=torch.float16, device=device).transpose(1, 2)
    return torch.empty(shape, dtype=torch.float32, device=device).transpose(1, 2)


def quantize_kv(x: Tensor, kv_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] as codes [..., D] (int4: [..., D / 2]) and scales [...] (int4: [..., 2])."""
    values = x.float()
    magnitude = values.abs().amax(-1, keepdim=True)
    finite = magnitude < math.inf

    # Divisors are tensors: torch multiplies by the reciprocal of a number, which rounds twice.
    def over(numbers: Tensor, divisor: float) -> Tensor:
        return numbers / torch.full_like(numbers, divisor)

    if kv_dtype == torch.uint8:
        values = values.clamp(-_FP16_MAX, _FP16_MAX)
        low, high = values.aminmax(dim=-1, keepdim=True)
        least = over(torch.maximum(high, -low), 240.0).clamp(min=2.0**-14)
        scale = torch.maximum(over(high - low, 15.0), least).half()
        zero = (-(low / scale.float()).round()).clamp(-240, 240).half()
        steps = (values / scale.float()).round() + zero.float()
        codes = steps.clamp(0, 15).where(finite, 0.0).to(torch.uint8)
        pair = torch.cat([scale, zero], -1).where(finite, math.nan)
        return codes[..., ::2] | codes[..., 1::2] << 4, pair

    largest = _LARGEST_CODE[kv_dtype]
    scale = over(magnitude, largest).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale.where(magnitude > 0, 1.0)
    steps = (values / scale).where(finite, 0.0)
    steps = steps.round() if kv_dtype == torch.int8 else steps
    return steps.clamp(-largest, largest).to(kv_dtype), scale.where(finite, math.nan).squeeze(-1)


def dequantize_kv(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes and scales, shaped as ``quantize_kv`` returns them, stand for: [..., D]."""
    if codes.dtype == torch.uint8:
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        factor, zero = scale.to(dtype).split(1, -1)
        return (nibbles.to(dtype) - zero) * factor
    return codes.to(dtype) * scale.to(dtype)[..., None]


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory with a dtype that torch can index: 8-bit floats as bytes."""
    is_float8 = tensor.dtype.is_floating_point and tensor.element_size() == 1
    return tensor.view(torch.uint8) if is_float8 else tensor
