"""AWQ: scales of input channels that keep the important weights, and clipping by output error."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effllm.quantization.folding import Fold
from effllm.quantization.granularity import Granularity
from effllm.quantization.method import UniformCodes
from effllm.quantization.round_to_nearest import check_weight, per_row
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.uniform import Grid, fit, from_tiles, to_tiles

_SMALLEST = 1e-4


def search_scales(
    weights: list[Tensor],
    inputs: InputStatistics,
    fold: Fold,
    grid: Grid,
    granularity: Granularity,
    steps: int,
) -> Tensor:
    """Factors ``[P]`` for the input channels of layers with one input, fp32.

    After Lin et al., AWQ (arXiv:2306.00978), section 3.2: ``s = |x|^a``, with the mean magnitude of
    each channel and the exponent for which the squared error of the outputs,
    ``|Q(W s) (x / s) - W x|^2``, is smallest, each layer's over that of ``W x``: queries and keys
    may be far larger than values, and matter no more. A second family, ``|x|^a / |w|^(1-a)`` with
    the mean of weights over their group's maximum, as in the authors' later code, is searched too.
    a = 0 in the first is no scaling: the result is never worse by this measure.

    Args:
        weights: float ``[N, K]`` of all layers.
        inputs: statistics of the common input.
        fold: which channels have a common factor.
        steps: exponents tried from 0 to 1.
    """
    magnitude = fold.gather((inputs.magnitude / max(1, inputs.tokens)).float())
    live = magnitude > 0
    tiles = [to_tiles(w.float().abs(), *granularity.weight_tile(*w.shape)) for w in weights]
    relative = [
        _untile(t / t.amax(-1, keepdim=True).clamp(min=1e-12), w, granularity)
        for t, w in zip(tiles, weights, strict=True)
    ]
    size = fold.gather(torch.cat(relative).mean(0))
    energies = [inputs.output_energy(w) or 1.0 for w in weights]
    best, best_error = torch.ones_like(magnitude), torch.inf
    for step in range(steps + 1):
        power = magnitude.clamp(min=_SMALLEST) ** (step / steps)
        for scales in (power, power / size.clamp(min=_SMALLEST) ** (1 - step / steps)):
            scales = centred(scales, live)
            columns = fold.spread(scales)
            error = sum(
                scaled_error(w, inputs, columns, grid, granularity) / energy
                for w, energy in zip(weights, energies, strict=True)
            )
            if error < best_error:
                best, best_error = scales, error
    return best


def centred(scales: Tensor, live: Tensor) -> Tensor:
    """Scales ``[P]`` around 1; channels that are always zero have nothing to say."""
    if not live.any():
        return torch.ones_like(scales)
    used = scales[live]
    moved = scales / (used.max() * used.min()).sqrt()
    return torch.where(live, moved.clamp(_SMALLEST, 1 / _SMALLEST), torch.ones_like(scales))


def scaled_error(
    weight: Tensor, inputs: InputStatistics, scales: Tensor, grid: Grid, granularity: Granularity
) -> float:
    """The sum of ``|Q(W s) (x / s) - W x|^2`` over the tokens, for scales ``[K]``."""
    rows, columns = granularity.weight_tile(*weight.shape)
    scaled = weight.float() * scales
    tiles = to_tiles(scaled, rows, columns)
    steps, zeros = fit(tiles, grid, weight.dtype)
    rounded = _untile(grid.nearest(tiles, steps[..., None], zeros[..., None]), weight, granularity)
    return inputs.output_energy((rounded - scaled) / scales)


def _untile(tiles: Tensor, weight: Tensor, granularity: Granularity) -> Tensor:
    return from_tiles(tiles, *granularity.weight_tile(*weight.shape), *weight.shape)


def quantise_clipped(
    weight: Tensor, inputs: InputStatistics | None, grid: Grid, granularity: Granularity
) -> UniformCodes:
    """Codes of a weight ``[N, K]`` with ranges cut where the output error is smallest.

    The error of a range is that of its own channels' part of the output, with the moments of these
    channels (AWQ's clipping search, over all tokens at once). Raises ValueError for a weight that
    is no matrix with data, or not finite.
    """
    check_weight(weight)
    n, k = weight.shape
    rows, columns = granularity.weight_tile(n, k)
    tiles = to_tiles(weight.float(), rows, columns)
    moments = None
    if inputs is not None and inputs.tokens:
        moments = _diagonal_blocks(inputs.hessian.float() / inputs.tokens, columns)

    def error(difference: Tensor) -> Tensor:
        if moments is None:
            return difference.square().sum(-1)
        parts = difference.unflatten(-1, (rows, columns))
        return (torch.einsum("agrc,gcd->agrd", parts, moments) * parts).sum((-1, -2))

    scales, zeros = fit(tiles, grid, weight.dtype, error)
    codes = grid.encode(tiles, scales[..., None], zeros[..., None])
    return UniformCodes(
        from_tiles(codes, rows, columns, n, k).to(torch.uint8),
        per_row(scales, rows, n).to(weight.dtype),
        None if grid.symmetric else per_row(zeros, rows, n).to(torch.uint8),
        columns,
        bits=grid.bits,
    )


def _diagonal_blocks(hessian: Tensor, size: int) -> Tensor:
    """``[G, size, size]`` along the diagonal; the last one is filled up with zeros."""
    padding = -hessian.shape[0] % size
    padded = F.pad(hessian, (0, padding, 0, padding))
    blocks = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
