"""Uniform grids: scales and zero points for tiles of values, and codes on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from effllm.ops.w4a8_gemm import MAX_MULTIPLIER

# Clipping is searched in two passes: which twentieth of the range, then which hundredth around it.
_COARSE = [step / 20 for step in range(20, 0, -1)]
_FINE = [step / 100 for step in range(-4, 5) if step]

# Scales of two levels: the multipliers that the largest of a row may get, what is tried beside the
# nearest ones for the others, and the bits of a step. More of any lower errors by less than 1 %.
_LARGEST = range(MAX_MULTIPLIER, 8, -2)
_OFFSETS = (0, -1, 1)
_STEP_BITS = 4


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels: ``value ~ (code - zero) * scale``.

    Attributes:
        bits: 2, 3 or 4; fewer bits use a part of the 4-bit codes. Or 8.
        symmetric: zero is ``middle``, and codes are 2**bits values around it. Otherwise codes start
            at 0 and the zero point is one of them, so that 0 stays exact.
        two_level: the scales of a row are 1 to 15 times one number; symmetric, of up to 4 bits.
    """

    bits: int
    symmetric: bool
    two_level: bool = False

    @property
    def middle(self) -> int:
        """The code that stands for 0 where there are no zero points, whatever part of 4 bits is
        used; or of 8 bits."""
        return 128 if self.bits == 8 else 8

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        low = self.middle - (1 << self.bits - 1) if self.symmetric else 0
        return low, low + (1 << self.bits) - 1

    def parameters(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales (fp32, holding values of ``dtype``) and zeros (fp32) for ranges low..high.

        A symmetric range reaches half a step beyond its outer levels: scale = amax / 7.5 at 4 bits.
        Otherwise the range, widened to hold 0, has its ends on the outer levels.
        """
        first, last = self.codes
        low, high = low.clamp(max=0), high.clamp(min=0)
        span = 2 * torch.maximum(-low, high) if self.symmetric else high - low
        # The codes are rounded with the scale as it is stored. Values that are all zero, or too
        # small for the dtype, get the scale 1: a 0 would give 0/0.
        scales = (span / (last - first)).to(dtype)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales).float()
        if self.symmetric:
            return scales, torch.full_like(scales, self.middle)
        return scales, torch.round(-low / scales).clamp(first, last)

    def encode(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes, fp32; scales and zeros are broadcast against the values."""
        return (torch.round(values / scales) + zeros).clamp(*self.codes)

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """What the values become."""
        return (self.encode(values, scales, zeros) - zeros) * scales


def squared_error(difference: Tensor) -> Tensor:
    """The sum of squares along the last dimension."""
    return difference.square().sum(-1)


def fit(
    values: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    error: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros, fp32 ``[...]``, for fp32 values ``[..., E]``: one each for E values.

    Args:
        values: ``[R, G, E]`` for scales of two levels, with G groups in a row.
        dtype: that the scales will be stored in.
        error: cut the range where this is smallest, a function from the differences ``[..., E]``
            between rounded values and values to ``[...]``. None: the range holds every value;
            scales of two levels are those near it of the least squared error.
    """
    if grid.two_level:
        scales, zeros = fit(values, replace(grid, two_level=False), torch.float32, error)
        return _multiples(values, scales, zeros, grid, dtype, error or squared_error), zeros
    low, high = values.amin(-1), values.amax(-1)
    if error is None:
        return grid.parameters(low, high, dtype)

    def error_at(ratio: Tensor) -> Tensor:
        scales, zeros = grid.parameters(low * ratio, high * ratio, dtype)
        return error(grid.nearest(values, scales[..., None], zeros[..., None]) - values)

    best = torch.ones_like(low)
    best_error = error_at(best)
    for offsets in (_COARSE[1:], _FINE):
        # Steps of the second pass are taken from where the first one ended.
        start = best.clone() if offsets is _FINE else torch.zeros_like(best)
        for offset in offsets:
            ratio = (start + offset).clamp(0.01, 1)
            found = error_at(ratio)
            better = found < best_error
            best = torch.where(better, ratio, best)
            best_error = torch.where(better, found, best_error)
    return grid.parameters(low * best, high * best, dtype)


def _multiples(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    error: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scales ``[R, G]`` of two levels near given ones, those with the least error of a row.

    A step has 4 significant bits, so that its multiples are numbers of every float dtype, too. The
    largest scale is 15, 13, 11 or 9 of them, the others the nearest multiple or one beside it.
    """
    # A group of zeros, whose scale is 1, has no say in the step.
    wanted = torch.where(values.abs().amax(-1) > 0, scales, torch.zeros_like(scales))
    largest = wanted.amax(-1, keepdim=True)
    best, best_error = torch.ones_like(scales), torch.full_like(largest, torch.inf)
    for multiplier in _LARGEST:
        bits = (largest / multiplier).view(torch.int32)
        bits = bits + (1 << 23 - _STEP_BITS) & -(1 << 24 - _STEP_BITS)  # to nearest
        steps = bits.view(torch.float32).to(dtype).float()
        steps = torch.where(steps == 0, torch.ones_like(steps), steps)
        nearest = torch.round(wanted / steps)
        found, found_error = best, torch.full_like(scales, torch.inf)
        for offset in _OFFSETS:
            tried = (nearest + offset).clamp(1, MAX_MULTIPLIER) * steps
            tried_error = error(grid.nearest(values, tried[..., None], zeros[..., None]) - values)
            better = tried_error < found_error
            found = torch.where(better, tried, found)
            found_error = torch.where(better, tried_error, found_error)
        row_error = found_error.sum(-1, keepdim=True)
        better = row_error < best_error
        best = torch.where(better, found, best)
        best_error = torch.where(better, row_error, best_error)
    return best


def to_tiles(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``[ceil(N/rows), ceil(K/columns), rows * columns]`` of a matrix, padded with 0.

    0 is on every grid: padding changes neither ranges that hold 0 nor squared errors.
    """
    n, k = matrix.shape
    padded = F.pad(matrix, (0, -k % columns, 0, -n % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return tiles.transpose(1, 2).flatten(2)


def from_tiles(tiles: Tensor, rows: int, columns: int, n: int, k: int) -> Tensor:
    """The matrix ``[n, k]`` of tiles."""
    return (
        tiles.unflatten(2, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k]
    ).contiguous()
