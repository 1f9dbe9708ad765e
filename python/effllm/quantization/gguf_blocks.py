"""Codes in the blocks of GGUF's 4-bit types, with scales found by search as in ggml's K-quants."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.quantization.method import UniformCodes
from effllm.quantization.round_to_nearest import check_weight
from effllm.quantization.uniform import from_tiles, to_tiles

BLOCK = 32
_LAST = 15
_MIDDLE = 8
# Steps between the extreme and zero that are tried, in tenths around 8 as in ggml; and the parts of
# the range that may be kept.
_EXTREMES = [8 + step / 10 for step in range(-9, 10)]
_RANGES = [1 - step / 40 for step in range(17)]


def quantise_blocks(weight: Tensor, zero_points: bool, importance: Tensor | None) -> UniformCodes:
    """Codes, fp16 scales and, with ``zero_points``, zeros of a weight ``[N, K]``.

    Of every start the scale is fitted to its codes by least squares, and the one whose error is
    smallest is taken, measured with the scale as it is stored. Without zero points scales may be
    negative: 16 codes are 8 steps to one side and 7 to the other, and the largest value decides
    which. With them a scale has 7 significant bits, so that its products with zero points, which
    are the minima that Q4_1 stores, are fp16 numbers.

    ``importance`` ``[K]`` weighs the squared errors of each input channel. Raises ValueError for a
    weight that is no matrix with data, or holds values that fp16 cannot.
    """
    check_weight(weight)
    n, k = weight.shape
    values = to_tiles(weight.float(), 1, BLOCK)
    mass = torch.ones(k, device=weight.device) if importance is None else importance
    masses = to_tiles(mass.to(weight.device, torch.float32).expand(n, k), 1, BLOCK)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    if float(torch.maximum(-low, high).max()) > torch.finfo(torch.float16).max:
        raise ValueError("weight holds values beyond the largest of fp16")
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
