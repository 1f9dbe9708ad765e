"""Weights: what granularity buys, what AWQ's scales do, and errors by layer and method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from effllm.quantization.awq import centred, scaled_error
from effllm.quantization.calibration import Batch, Calibration
from effllm.quantization.configs import LinearConfig
from effllm.quantization.granularity import Granularity
from effllm.quantization.method import GROUP_64, Method
from effllm.quantization.report import LayerResult
from effllm.quantization.sensitivity import measure_layers
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.targets import Filter, find_targets
from effllm.quantization.uniform import Grid


@dataclass(frozen=True)
class GranularityError:
    """What a granularity costs, and what it leaves of a weight.

    Attributes:
        granularity: of scales and zero points.
        bits_per_weight: codes, scales of 16 bits, and zero points of as many bits as the codes.
        error: squared error of the weight over its squared norm.
    """

    granularity: str
    bits_per_weight: float
    error: float


def granularity_errors(
    weight: Tensor,
    bits: int = 4,
    granularities: Sequence[Granularity] | None = None,
    *,
    clip: bool = False,
) -> list[GranularityError]:
    """What finer scales buy: linear codes with zero points, of a float weight ``[N, K]``.

    Args:
        bits: of the codes: 2, 3 or 4.
        granularities: by default tensor, channel, and groups of 128, 64 and 32.
        clip: as in ``LinearConfig``.
    """
    n, k = weight.shape
    if granularities is None:
        groups = [Granularity.group(size) for size in (128, 64, 32)]
        granularities = [Granularity.tensor(), Granularity.channel(), *groups]
    weight = weight.detach()
    energy = float(weight.double().square().sum())
    found = []
    for granularity in granularities:
        dense = LinearConfig(bits, granularity, False, clip).quantise(weight, None).dense()
        error = float((dense - weight.float()).double().square().sum())
        rows, columns = granularity.weight_tile(n, k)
        tiles = -(-n // rows) * -(-k // columns)
        size = bits + tiles * (16 + bits) / (n * k)
        found.append(GranularityError(str(granularity), size, error / energy if energy else 0.0))
    return found


@dataclass(frozen=True)
class ScaleSearch:
    """AWQ's search over the exponent a in ``s = |x|^a``.

    Attributes:
        exponents: those tried.
        errors: squared error of the output over its energy, for each.
        magnitudes: mean magnitude of each input channel.
        channel_errors: for the first and for the best exponent, what each input channel's rounding
            adds to the output's error on its own, over the output's energy.
        best: index of the best exponent.
    """

    exponents: list[float]
    errors: list[float]
    magnitudes: list[float]
    channel_errors: tuple[list[float], list[float]]
    best: int


def scale_search(
    weight: Tensor,
    x: Tensor,
    bits: int = 4,
    granularity: Granularity = GROUP_64,
    steps: int = 20,
) -> ScaleSearch:
    """What AWQ's scales do for one layer: channels of large inputs are rounded better, at the cost
    of the others in their groups, until these suffer more.

    Args:
        weight: float ``[N, K]``.
        x: its inputs, float ``[T, K]``.
        bits, granularity: of the codes, which have zero points.
        steps: exponents between 0 and 1.
    """
    weight = weight.detach().float()
    inputs = InputStatistics(weight.shape[1], weight.device)
    inputs.add(x)
    magnitude = inputs.magnitude / max(1, inputs.tokens)
    energy = inputs.output_energy(weight) or 1.0
    exponents = [step / steps for step in range(steps + 1)]
    candidates = [
        centred(magnitude.clamp(min=1e-4) ** exponent, magnitude > 0) for exponent in exponents
    ]
    grid = Grid(bits, symmetric=False)
    errors = [scaled_error(weight, inputs, s, grid, granularity) / energy for s in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)

    def by_channel(scales: Tensor) -> list[float]:
        codes = LinearConfig(bits, granularity, False).quantise(weight * scales, None)
        difference = codes.dense() / scales - weight
        parts: list[float] = (difference.square().sum(0) * inputs.diagonal / energy).tolist()
        return parts

    channels = by_channel(candidates[0]), by_channel(candidates[best])
    return ScaleSearch(exponents, errors, magnitude.tolist(), channels, best)


def layer_errors(
    model: nn.Module,
    configs: Mapping[str, Method],
    calibration: Tensor | Iterable[Batch],
    filter_fn: Filter | None = None,
    *,
    progress: bool = True,
) -> dict[str, list[LayerResult]]:
    """What each method makes of each layer alone, on inputs of the model as it is, by its name.

    Args:
        model: is not changed.
        configs: by the names that plots shall show.
        calibration, filter_fn, progress: as in ``quantize_``.

    Raises ValueError without configs or layers, and what ``quantize_`` raises for layers that
    cannot be quantised.
    """
    methods = list(configs.values())
    targets = find_targets(model, methods[0], filter_fn)[0] if methods else []
    if not targets:
        raise ValueError("layer_errors: needs a config, and a linear layer to quantise")
    found = measure_layers(model, targets, methods, Calibration.of(calibration), progress)
    return {label: [found[name][i] for name in found] for i, label in enumerate(configs)}
