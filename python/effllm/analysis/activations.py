"""Activations: what layers get, which channels and tokens stand out, and what 8 bits cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effllm.quantization.blocks import evaluating
from effllm.quantization.calibration import Batch, Calibration, feed
from effllm.quantization.granularity import Granularity
from effllm.quantization.uniform import from_tiles, to_tiles


@dataclass(frozen=True)
class Outliers:
    """What stands out among activations ``[T, K]``.

    Attributes:
        channel_peaks: largest magnitude of each of the K channels.
        token_peaks: of each of the T tokens.
        channels: those whose peak is beyond the threshold times the median peak, largest first.
        tokens: the same of tokens.
        threshold: as given.
    """

    channel_peaks: list[float]
    token_peaks: list[float]
    channels: list[int]
    tokens: list[int]
    threshold: float


def find_outliers(x: Tensor, threshold: float = 6.0) -> Outliers:
    """Channels and tokens that are far larger than most.

    Args:
        x: float ``[..., K]``; leading dimensions are tokens.
        threshold: how many times the median peak.

    Raises ValueError for x without elements.
    """
    if not x.numel() or x.dim() < 1:
        raise ValueError(f"find_outliers: x must be [..., K] and not empty, got {list(x.shape)}")
    size = x.detach().reshape(-1, x.shape[-1]).float().abs()
    channels, tokens = size.amax(0), size.amax(1)

    def beyond(peaks: Tensor) -> list[int]:
        order = peaks.argsort(descending=True)
        found: list[int] = order[peaks[order] > threshold * peaks.median()].tolist()
        return found

    return Outliers(channels.tolist(), tokens.tolist(), beyond(channels), beyond(tokens), threshold)


def layer_inputs(
    model: nn.Module,
    calibration: Tensor | Iterable[Batch],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> dict[str, Tensor]:
    """What linear layers get: ``[T, K]`` of each, in the order of the model.

    Args:
        model: run in evaluation mode.
        calibration: as in ``quantize_``; padding is not left out.
        filter_fn: ``filter_fn(module, name) -> bool`` chooses among the ``nn.Linear`` layers: the
            inputs of all of them may be large.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (filter_fn is None or filter_fn(module, name))
    }
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in Calibration.of(calibration).batches:
                feed(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def round_activations(x: Tensor, granularity: Granularity, bits: int = 8) -> Tensor:
    """Activations ``[T, K]`` as symmetric codes of ``bits`` bits stand for them, fp32.

    The scale is the largest magnitude over ``2**(bits - 1) - 1``, as kernels for 8 bits have it;
    what is all zero stays so. Raises ValueError for x that is no matrix.
    """
    if x.dim() != 2:
        raise ValueError(f"round_activations: x must be [T, K], got {list(x.shape)}")
    t, k = x.shape
    rows, columns = granularity.activation_tile(t, k)
    tiles = to_tiles(x.float(), rows, columns)
    scales = tiles.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = torch.round(tiles / torch.where(scales == 0, 1.0, scales))
    return from_tiles(codes * scales, rows, columns, t, k)


@dataclass(frozen=True)
class ActivationError:
    """What rounding activations does to the output of a layer.

    Attributes:
        granularity: of the activations' scales.
        factor: by which the outlier channels were made larger.
        error: squared error of the output over its energy.
    """

    granularity: str
    factor: float
    error: float


def activation_errors(
    x: Tensor,
    weight: Tensor,
    granularities: Sequence[Granularity] = (Granularity.tensor(), Granularity.token()),
    *,
    factors: Sequence[float] = (1, 4, 16, 64),
    channels: int = 1,
    bits: int = 8,
) -> list[ActivationError]:
    """How outliers hurt: the largest channels grow, and the others are left with few codes.

    Columns of the weight shrink by as much as their channels grow, so that the exact output is
    always the same.

    Args:
        x: float ``[T, K]``.
        weight: float ``[N, K]``, not rounded.
        factors: how much larger the channels get.
        channels: how many: those of the largest mean magnitude.
        bits: of the codes of x.
    """
    x, weight = x.float(), weight.detach().float()
    exact = x @ weight.T
    largest = x.abs().mean(0).topk(channels).indices
    errors = []
    for granularity in granularities:
        for factor in factors:
            scales = torch.ones_like(x[0])
            scales[largest] = factor
            rounded = round_activations(x * scales, granularity, bits)
            difference = rounded @ (weight / scales).T - exact
            error = float(difference.double().square().sum() / exact.double().square().sum())
            errors.append(ActivationError(str(granularity), float(factor), error))
    return errors
