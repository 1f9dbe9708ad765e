"""Round-to-nearest codes of one weight matrix, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.quantization.uniform import Grid, fit, from_tiles, squared_error, to_tiles


def round_to_nearest(
    weight: Tensor,
    group_size: int,
    symmetric: bool,
    *,
    bits: int = 4,
    rows: int = 1,
    clip: bool = False,
    two_level: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points with ``weight ~ (code - zero) * scale``.

    Args:
        weight: float ``[N, K]``.
        group_size: input channels per scale; the last group of a row may be short.
        symmetric: scale = amax / 7.5 and zero = 8. Otherwise scale = (max - min) / 15 over the
            group and 0 (so that the zero point is one of the codes and 0 stays exact).
        bits: 2, 3 or 4: there are 2**bits codes, and 7.5 and 15 above are 2**(bits - 1) - 0.5 and
            2**bits - 1. Symmetric codes lie around 8, others start at 0.
        rows: output channels that share a scale.
        clip: choose the range with the smallest squared error, not the one that holds all values.
        two_level: scales are 1 to 15 times one number of their rows, see ``W4A8Linear``.

    Returns:
        codes uint8 ``[N, K]`` in 0..15, scales ``[N, G]`` in the weight's dtype, zeros uint8
        ``[N, G]`` or None when symmetric, with G = ceil(K / group_size).

    Raises:
        ValueError: the weight is not a float matrix with data, or holds NaN or infinity.
    """
    check_weight(weight)
    n, k = weight.shape
    grid = Grid(bits, symmetric, two_level)
    tiles = to_tiles(weight.float(), rows, group_size)
    scales, zeros = fit(tiles, grid, weight.dtype, squared_error if clip else None)
    codes = grid.encode(tiles, scales.unsqueeze(-1), zeros.unsqueeze(-1))

    return (
        from_tiles(codes, rows, group_size, n, k).to(torch.uint8),
        per_row(scales, rows, n).to(weight.dtype),
        None if symmetric else per_row(zeros, rows, n).to(torch.uint8),
    )


def per_row(values: Tensor, rows: int, n: int) -> Tensor:
    """``[n, G]`` of ``[ceil(n / rows), G]``: what ``rows`` rows share, for each of them."""
    return values.repeat_interleave(rows, 0)[:n].contiguous()


def check_weight(weight: Tensor) -> None:
    """Raises ValueError unless it is a float matrix with data, all of it finite."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix, got {weight.dtype} {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError("weight is on the meta device; load it before quantising")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity")
