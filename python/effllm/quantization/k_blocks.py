"""Codes and headers of Q8_0, Q4_K and Q6_K: scales by search, as they are stored.

As ggml's quantisers, by a search over starts that least squares refine; scales of scales are
searched for as well, and all errors measured with what the blocks will hold.

Source: the block structs of ggml (ggml-common.h); scales by weighted least squares as in its
K-quants (llama.cpp pull request 1684).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effllm.nn.gguf_linear import LAYOUTS, BlockType, k_header

# Blocks that are searched at once, in values.
_PIECE = 1 << 20
# How far from the extreme code the extreme value is tried, in steps.
_OFFSETS = [step / 5 for step in range(-15, 16)]
# The same for both ends of a range, together and in the number of steps of Q4_K.
_RANGES = [step / 10 for step in range(-10, 21)]
# Where the largest of the scales may go among the whole ones, as a part of the last of them.
_TOPS = (1.0, 0.93, 0.86, 0.79)
_ROUNDS = 3


def search_blocks(
    weight: Tensor, tensor_type: BlockType, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and headers of a weight, as ``GgufLinear.from_codes`` takes them.

    Args:
        weight: float ``[N, K]``, K a multiple of the type's block, finite and in fp16's range.
        tensor_type: what holds it.
        importance: ``[K]``, weighs the squared errors of each input channel; None: all alike.

    Returns:
        codes uint8 ``[N, K]``, headers uint8 ``[N, K / block * bytes]``.
    """
    n, k = weight.shape
    layout, search = LAYOUTS[tensor_type], _SEARCHES[tensor_type]
    mass = torch.ones(k, device=weight.device) if importance is None else importance
    # A channel that no input reaches counts next to nothing, but is not left to chance.
    mass = mass.to(weight.device, torch.float32)
    mass = mass / mass.mean().clamp_min(torch.finfo(torch.float32).tiny) + 1e-6
    masses = mass.view(1, -1, layout.run)
    codes = torch.empty(n, k, device=weight.device, dtype=torch.uint8)
    headers = codes.new_empty(n, k // layout.values * layout.header_bytes)
    runs = layout.values // layout.run
    # A GPU is kept busy by more at once.
    step = max(1, _PIECE * (1 if weight.device.type == "cpu" else 16) // k)
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        values = weight[rows].float().reshape(-1, runs, layout.run)
        weights = masses.expand(rows.stop - first, -1, -1).reshape(values.shape)
        found, header = search(values, weights)
        codes[rows] = found.view(-1, k)
        headers[rows] = header.view(rows.stop - first, -1)
    return codes, headers


class _Best:
    """What has had the least error so far, each part ``[..., 1]`` beside the errors."""

    def __init__(self, *parts: Tensor) -> None:
        self.error = torch.full_like(parts[0], torch.inf)
        self.parts = parts

    def offer(self, error: Tensor, *parts: Tensor) -> None:
        """Takes the parts where the error is less."""
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.parts = tuple(
            torch.where(better, new, old) for new, old in zip(parts, self.parts, strict=True)
        )


def _steps(values: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers nearest to ``values / scales``; 0 where that is none."""
    return torch.round(values / scales).nan_to_num(0, 0, 0).clamp(low, high)


def _error(values: Tensor, masses: Tensor, dense: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return (masses * (dense - values).square()).sum(dims, keepdim=True)


def _search_symmetric(
    values: Tensor, masses: Tensor, low: int, high: int, stored: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scales ``[..., 1]`` of runs with the codes ``low..high``: the value of largest magnitude is
    put near ``low`` if there are more codes on that side."""
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    best = _Best(torch.zeros_like(extreme))
    for offset in _OFFSETS:
        scales = stored(extreme / (low + offset))
        for _ in range(2):
            steps = _steps(values, scales, low, high)
            best.offer(_error(values, masses, steps * scales, -1), scales)
            fitted = (masses * values * steps).sum(-1, True) / (masses * steps * steps).sum(
                -1, True
            )
            scales = stored(fitted.nan_to_num(0, 0, 0))
        steps = _steps(values, scales, low, high)
        best.offer(_error(values, masses, steps * scales, -1), scales)
    return best.parts[0]


def _as_half(numbers: Tensor) -> Tensor:
    """The nearest fp16 numbers, in fp32; the largest instead of infinity."""
    limit = torch.finfo(torch.float16).max
    return numbers.clamp(-limit, limit).half().float()


def _bytes(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype).contiguous().view(torch.uint8)


def _q8_0(values: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    scales = _search_symmetric(values, masses, -127, 127, _as_half)
    return _steps(values, scales, -127, 127) + 128, _bytes(scales, torch.float16)


def _q6_k(values: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of runs first; then d and whole scales, and d again by least squares."""
    wanted = _search_symmetric(values, masses, -32, 31, lambda scales: scales)
    extreme = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))
    best = _Best(torch.zeros_like(extreme), torch.zeros_like(wanted))
    for top in _TOPS:
        d = _as_half(extreme / (-128 * top))
        for _ in range(_ROUNDS):
            nearest = _steps(wanted, d, -128, 127)
            runs = _Best(nearest)
            for scales in (nearest, nearest - 1, nearest + 1):
                scales = scales.clamp(-128, 127)
                dense = _steps(values, scales * d, -32, 31) * (scales * d)
                runs.offer(_error(values, masses, dense, -1), scales)
            (scales,) = runs.parts
            best.offer(runs.error.sum(1, True), d, scales)
            units = _steps(values, scales * d, -32, 31) * scales
            fitted = (masses * values * units).sum((1, 2), True)
            fitted = fitted / (masses * units * units).sum((1, 2), True)
            d = _as_half(fitted.nan_to_num(0, 0, 0))
    d, scales = best.parts
    codes = _steps(values, scales * d, -32, 31) + 32
    header = torch.cat([_bytes(scales, torch.int8).flatten(1), _bytes(d, torch.float16)[:, 0]], 1)
    return codes, header


def _q4_k(values: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of runs first; then d, dmin and whole ones, which are tried around their
    nearest; then d and dmin together by least squares."""
    wanted, lows = _search_range(values, masses)
    none, no_runs = torch.zeros_like(wanted[:, :1]), torch.zeros_like(wanted)
    best = _Best(none, none, no_runs, no_runs)
    for top in _TOPS:
        d = _as_half(wanted.amax(1, True) / (63 * top))
        dmin = _as_half(lows.amax(1, True) / (63 * top))
        for _ in range(_ROUNDS):
            scales, minima, errors = _whole(values, masses, wanted, lows, d, dmin)
            best.offer(errors.sum(1, True), d, dmin, scales, minima)
            codes = _steps(values + minima * dmin, scales * d, 0, 15)
            d, dmin = _fit_pair(values, masses, codes * scales, minima)
    d, dmin, scales, minima = best.parts
    codes = _steps(values + minima * dmin, scales * d, 0, 15)
    halves = [part.squeeze(-1).half() for part in (d, dmin)]
    return codes, k_header(*halves, *(p.squeeze(-1).to(torch.uint8) for p in (scales, minima)))


def _search_range(values: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima (which are taken away, so not negative) ``[..., 1]`` of runs of Q4_K."""
    low, high = values.amin(-1, True).clamp(max=0), values.amax(-1, True).clamp(min=0)
    total, first = masses.sum(-1, True), (masses * values).sum(-1, True)
    best = _Best(torch.zeros_like(low), torch.zeros_like(low))
    for offset in _RANGES:
        scales, minima = (high - low) / (15 + offset), -low
        for _ in range(2):
            codes = _steps(values + minima, scales, 0, 15)
            best.offer(_error(values, masses, codes * scales - minima, -1), scales, minima)
            scales, minima = _fit_line(values, masses, codes, total, first)
        codes = _steps(values + minima, scales, 0, 15)
        best.offer(_error(values, masses, codes * scales - minima, -1), scales, minima)
    return best.parts[0], best.parts[1]


def _fit_line(
    values: Tensor, masses: Tensor, codes: Tensor, total: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and minimum by least squares for given codes; through 0 where the minimum would be
    negative. ``total`` and ``first`` are sums of the masses, and of them times values."""
    weighted = masses * codes
    one, two = weighted.sum(-1, True), (weighted * codes).sum(-1, True)
    mixed = (weighted * values).sum(-1, True)
    spread = total * two - one * one
    scales = (total * mixed - first * one) / spread
    minima = (one * mixed - first * two) / spread
    through = minima < 0
    scales = torch.where(through, mixed / two, scales)
    minima = torch.where(through, 0, minima)
    return scales.nan_to_num(0, 0, 0).clamp(min=0), minima.nan_to_num(0, 0, 0)


def _whole(
    values: Tensor, masses: Tensor, wanted: Tensor, lows: Tensor, d: Tensor, dmin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole scales and minima ``[B, 8, 1]`` for given d and dmin, and the errors of their runs."""
    nearest, start = _steps(wanted, d, 0, 63), _steps(lows, dmin, 0, 63)
    total = masses.sum(-1, True)
    runs = _Best(nearest, start)
    for scales in (nearest, nearest - 1, nearest + 1):
        scales, minima = scales.clamp(0, 63), start
        for _ in range(2):
            codes = _steps(values + minima * dmin, scales * d, 0, 15)
            dense = codes * (scales * d) - minima * dmin
            runs.offer(_error(values, masses, dense, -1), scales, minima)
            gap = (masses * (codes * (scales * d) - values)).sum(-1, True) / total
            minima = _steps(gap, dmin, 0, 63)
        codes = _steps(values + minima * dmin, scales * d, 0, 15)
        dense = codes * (scales * d) - minima * dmin
        runs.offer(_error(values, masses, dense, -1), scales, minima)
    return runs.parts[0], runs.parts[1], runs.error


def _fit_pair(
    values: Tensor, masses: Tensor, units: Tensor, minima: Tensor
) -> tuple[Tensor, Tensor]:
    """d and dmin ``[B, 1, 1]`` by least squares, for ``values ~ units * d - minima * dmin``."""

    def total(numbers: Tensor) -> Tensor:
        return (masses * numbers).sum((1, 2), True)

    two, mixed, low = total(units * units), total(units * minima), total(minima * minima)
    up, down = total(units * values), total(-minima * values)
    spread = two * low - mixed * mixed
    d = torch.where(spread > 0, (up * low + mixed * down) / spread, up / two)
    dmin = torch.where(spread > 0, (two * down + mixed * up) / spread, 0)
    return _as_half(d.nan_to_num(0, 0, 0)), _as_half(dmin.nan_to_num(0, 0, 0).clamp(min=0))


_SEARCHES: dict[BlockType, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}
