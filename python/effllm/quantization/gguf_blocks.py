"""Codes in the blocks of GGUF's types, with scales found by search as in ggml's K-quants."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from effllm.nn.gguf_linear import LAYOUTS, BlockType
from effllm.quantization.k_blocks import search_blocks
from effllm.quantization.method import GgufCodes, UniformCodes
from effllm.quantization.round_to_nearest import check_weight
from effllm.quantization.uniform import from_tiles, to_tiles

GgufType = Literal["q4_0", "q4_1", "q8_0", "q4_k", "q6_k"]
"""Types of GGUF that weights can be quantised to."""

BLOCK = 32
_LAST = 15
_MIDDLE = 8
# Steps between the extreme and zero that are tried, in tenths around 8 as in ggml; and the parts of
# the range that may be kept.
_EXTREMES = [8 + step / 10 for step in range(-9, 10)]
_RANGES = [1 - step / 40 for step in range(17)]


def fitting_type(tensor_type: GgufType, k: int) -> GgufType:
    """The type for rows of ``k`` values: where no blocks of 256 fit, Q4_1 for Q4_K, Q8_0 for Q6_K.

    As llama.cpp does it, which takes Q5_0 for the former.
    """
    if (tensor_type == "q4_k" or tensor_type == "q6_k") and k % LAYOUTS[tensor_type].values:
        return "q4_1" if tensor_type == "q4_k" else "q8_0"
    return tensor_type


def quantise_gguf(
    weight: Tensor, tensor_type: GgufType, importance: Tensor | None
) -> UniformCodes | GgufCodes:
    """Codes of a weight ``[N, K]`` in blocks of the type, or of that which ``fitting_type`` says.

    ``importance`` ``[K]`` weighs the squared errors of each input channel. Raises ValueError for a
    weight that is no matrix with data, holds values that fp16 cannot, or rows that do not fit.
    """
    _check(weight)
    k = weight.shape[1]
    kind = fitting_type(tensor_type, k)
    if kind == "q4_0" or kind == "q4_1":
        return quantise_blocks(weight, kind == "q4_1", importance)
    if k % LAYOUTS[kind].values:
        raise ValueError(f"{kind} needs rows of a multiple of 32 values, got {k}")
    return quantise_fitting(weight, kind, importance)


def quantise_fitting(
    weight: Tensor, tensor_type: BlockType, importance: Tensor | None
) -> GgufCodes:
    """As ``quantise_gguf``, for rows that are whole blocks of the type."""
    _check(weight)
    return GgufCodes(*search_blocks(weight, tensor_type, importance), tensor_type)


def _check(weight: Tensor) -> None:
    check_weight(weight)
    if float(weight.abs().max()) > torch.finfo(torch.float16).max:
        raise ValueError("weight holds values beyond the largest of fp16")


def quantise_blocks(weight: Tensor, zero_points: bool, importance: Tensor | None) -> UniformCodes:
    """Codes, fp16 scales and, with ``zero_points``, zeros of a weight ``[N, K]``.

    Of every start the scale is fitted to its codes by least squares, and the one whose error is
    smallest is taken, measured with the scale as it is stored. Without zero points scales may be
    negative: 16 codes are 8 steps to one side and 7 to the other, and the largest value decides
    which. With them a scale has 7 significant bits, so that its products with zero points, which
    are the minima that Q4_1 stores, are fp16 numbers.

    ``importance`` is as in ``quantise_gguf``.
    """
    n, k = weight.shape
    values = to_tiles(weight.float(), 1, BLOCK)
    mass = torch.ones(k, device=weight.device) if importance is None else importance
    masses = to_tiles(mass.to(weight.device, torch.float32).expand(n, k), 1, BLOCK)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    starts: list[tuple[Tensor, Tensor]] = []
    if zero_points:
        for part in _RANGES:
            scales = _stored((high - low) * part / _LAST, True)
            middle = torch.round(-low * part / scales)
            starts += [(scales, (middle + side).clamp(0, _LAST)) for side in (-1, 0, 1)]
    else:
        extreme = torch.where(high > -low, high, low)
        middle = torch.full_like(extreme, _MIDDLE)
        starts = [(_stored(extreme / -steps, False), middle) for steps in _EXTREMES]

    best, zeros = starts[0][0], starts[0][1]
    best_error = torch.full_like(best, torch.inf)
    for start, zero in starts:
        steps = _encode(values, start, zero) - zero[..., None]
        fitted = (masses * values * steps).sum(-1) / (masses * steps * steps).sum(-1)
        fitted = torch.where(torch.isfinite(fitted), fitted, start)
        for scales in (start, _stored(fitted, zero_points)):
            dense = (_encode(values, scales, zero) - zero[..., None]) * scales[..., None]
            error = (masses * (dense - values).square()).sum(-1)
            better = error < best_error
            best = torch.where(better, scales, best)
            zeros = torch.where(better, zero, zeros)
            best_error = torch.where(better, error, best_error)
    codes = from_tiles(_encode(values, best, zeros), 1, BLOCK, n, k).to(torch.uint8)
    return UniformCodes(codes, best.half(), zeros.to(torch.uint8) if zero_points else None, BLOCK)


def _encode(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (torch.round(values / scales[..., None]) + zeros[..., None]).clamp(0, _LAST)


def _stored(scales: Tensor, short: bool) -> Tensor:
    """The nearest fp16 numbers, with 7 significant bits if ``short``, in fp32; 1 instead of 0."""
    if short:
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.round(mantissa * 128) / 128, exponent)
        # Products with a zero point below the smallest normal number lose bits.
        scales = torch.where(scales.abs() < 2.0**-14, torch.zeros_like(scales), scales)
    scales = scales.half().float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)
