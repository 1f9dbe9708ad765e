"""Codebooks by k-means in one dimension, for many sets of weights at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effllm.quantization.codebook import round_to_codebook
from effllm.quantization.granularity import Granularity
from effllm.quantization.method import CodebookCodes
from effllm.quantization.round_to_nearest import check_weight
from effllm.quantization.uniform import to_tiles

# What the kernel's codebooks hold.
_ENTRIES = 16
_MAX_ITERATIONS = 100


def quantise_kmeans(
    weight: Tensor, bits: int, granularity: Granularity, importance: Tensor | None
) -> CodebookCodes:
    """Codebooks of 2**bits entries, in the dtype of the weight ``[N, K]``, and codes into them.

    ``importance`` ``[K]`` weighs the squared errors of each input channel. Raises ValueError for a
    weight that is no matrix with data, or not finite.
    """
    check_weight(weight)
    n, k = weight.shape
    rows, columns = granularity.weight_tile(n, k)
    # The zeros that fill up the last group must not draw entries to them.
    mass = torch.ones(k, device=weight.device) if importance is None else importance
    tiles = to_tiles(weight.float(), rows, columns)
    masses = to_tiles(mass.to(weight.device, torch.float32).expand(n, k), rows, columns)
    entries = kmeans(tiles.flatten(0, 1), 1 << bits, masses.flatten(0, 1)).to(weight.dtype)
    # Unused entries repeat the last one; codes of them become its code.
    entries = F.pad(entries[:, None], (0, _ENTRIES - (1 << bits)), mode="replicate")[:, 0]
    shape = {"tensor": (_ENTRIES,), "channel": (n, _ENTRIES)}
    codebook = entries.view(shape.get(granularity.kind, (*tiles.shape[:2], _ENTRIES)))
    codes, _ = round_to_codebook(weight, codebook, columns, scaled=False)
    return CodebookCodes(codes.clamp_(max=(1 << bits) - 1), codebook.contiguous(), columns)


def kmeans(values: Tensor, size: int, importance: Tensor | None = None) -> Tensor:
    """Codebooks ``[S, size]`` in ascending order, fp32, of S sets of values.

    Lloyd's iterations from two starts, of which each set keeps the better end: entries evenly
    spaced over the range, which keep the few large weights (Deep Compression, arXiv:1510.00149,
    section 3.2), and entries at evenly spaced quantiles, which serve the many small ones. Sorted
    values make clusters intervals, and prefix sums make an iteration as cheap as looking up the
    bounds of these.

    Args:
        values: float ``[S, E]``.
        size: entries of a codebook.
        importance: float ``[S, E]``, not negative: weights of the squared errors. Where those of a
            set are all 0, they count as 1.
    """
    values, order = values.double().sort(-1)
    mass = torch.ones_like(values)
    if importance is not None:
        mass = importance.double().gather(-1, order)
        mass = torch.where(mass.sum(-1, keepdim=True) == 0, torch.ones_like(mass), mass)
    sums = _PrefixSums(values, mass)
    # Values without mass, padding among them, have no say in the starts either.
    cumulated = sums.mass[:, 1:].contiguous()
    shares = (torch.arange(size, dtype=values.dtype, device=values.device) + 0.5) / size
    places = torch.searchsorted(cumulated, cumulated[:, -1:] * shares)
    low = values.gather(-1, (cumulated <= 0).sum(-1, keepdim=True))
    high = values.gather(-1, torch.searchsorted(cumulated, cumulated[:, -1:].contiguous()))
    steps = torch.linspace(0, 1, size, dtype=values.dtype, device=values.device)
    starts = [low + (high - low) * steps, values.gather(-1, places)]
    (even, even_gain), (dense, dense_gain) = (_lloyd(values, sums, start) for start in starts)
    return torch.where((even_gain >= dense_gain)[:, None], even, dense).float()


class _PrefixSums:
    """Sums of mass and of mass * value over runs of sorted values."""

    def __init__(self, values: Tensor, mass: Tensor) -> None:
        zero = torch.zeros_like(values[:, :1])
        self.mass = torch.cat([zero, mass.cumsum(-1)], -1)
        self.moment = torch.cat([zero, (mass * values).cumsum(-1)], -1)

    def between(self, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Mass and moment between consecutive bounds ``[S, C + 1]``: two ``[S, C]``."""
        return self.mass.gather(-1, bounds).diff(dim=-1), self.moment.gather(-1, bounds).diff(
            dim=-1
        )


def _lloyd(values: Tensor, sums: _PrefixSums, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Entries ``[S, C]`` where Lloyd's iterations end, and the gain ``[S]`` of each set.

    The squared error is the sum of ``mass * value**2``, which is fixed, minus the gain.
    """
    first = torch.zeros_like(entries[:, :1], dtype=torch.long)
    last = torch.full_like(first, values.shape[-1])
    gain = torch.full_like(entries[:, 0], -torch.inf)
    for _ in range(_MAX_ITERATIONS):
        middles = (entries[:, 1:] + entries[:, :-1]) / 2
        inner = torch.searchsorted(values, middles.contiguous())
        mass, moment = sums.between(torch.cat([first, inner, last], -1))
        # A cluster without mass keeps its entry.
        entries = torch.where(mass > 0, moment / mass.clamp(min=1e-300), entries)
        previous, gain = gain, (mass * entries.square()).sum(-1)
        if (gain - previous <= 1e-7 * gain.abs()).all():
            break
    return entries, gain
