"""Histograms of tensors of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """How often values fall between edges.

    Attributes:
        edges: ascending, one more than counts; a value on an inner edge counts to its right.
        counts: of each bin.
        outside: values beyond the first and the last edge.
    """

    edges: list[float]
    counts: list[int]
    outside: int

    @property
    def densities(self) -> list[float]:
        """Counts over all values and the width of a bin: they integrate to 1 but for those
        outside."""
        total = sum(self.counts) + self.outside
        widths = [b - a for a, b in zip(self.edges, self.edges[1:], strict=False)]
        return [n / (total * w) for n, w in zip(self.counts, widths, strict=True)]


def histogram(
    values: Tensor, bins: int = 100, limits: tuple[float, float] | None = None
) -> Histogram:
    """Counts over bins of equal width.

    Args:
        values: float, of any shape and device, not empty.
        limits: first and last edge; the smallest and the largest value if None.

    Raises:
        ValueError: no values, NaN or infinity among them, less than one bin, or limits that do not
            ascend.
    """
    flat = values.detach().flatten().double()
    if not flat.numel() or not torch.isfinite(flat).all():
        raise ValueError(
            f"histogram: values must be finite, and at least one, got {flat.numel()}, of which "
            f"{int((~torch.isfinite(flat)).sum())} are NaN or infinity"
        )
    low, high = (float(flat.min()), float(flat.max())) if limits is None else limits
    if limits is None and low == high:
        low, high = low - 0.5, high + 0.5
    if bins < 1 or not low < high:
        raise ValueError(
            f"histogram: needs at least one bin and ascending limits, got {bins}, {low} and {high}"
        )
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64, device=flat.device)
    inside = flat[(flat >= low) & (flat <= high)]
    # The last edge belongs to the last bin.
    places = torch.bucketize(inside, edges, right=True).sub(1).clamp(max=bins - 1)
    counts = torch.bincount(places, minlength=bins)
    return Histogram(edges.tolist(), counts.tolist(), flat.numel() - inside.numel())
