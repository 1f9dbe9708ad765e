"""Bits where they matter: a config for each layer by how much its output suffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from math import inf

from torch import Tensor, nn
from tqdm import tqdm

from effllm.quantization.blocks import BlockStream, evaluating, find_blocks
from effllm.quantization.calibration import Batch, Calibration
from effllm.quantization.collecting import Pass, collect, trace_inputs, whole_pass
from effllm.quantization.method import Method
from effllm.quantization.quantize_layer import quantise_alone
from effllm.quantization.report import LayerResult
from effllm.quantization.targets import Filter, Target, find_targets


def choose_configs(
    model: nn.Module,
    configs: Sequence[Method],
    calibration: Tensor | Iterable[Batch],
    *,
    average_bits: float | None = None,
    max_bytes: int | None = None,
    filter_fn: Filter | None = None,
    progress: bool = True,
) -> dict[str, Method]:
    """One of several configs for each linear layer, with a given number of bits or bytes.

    Each layer is quantised alone with every config, and its relative output error on the inputs of
    the unquantised model is its sensitivity. All layers begin with the fewest bits or bytes; then
    the step that lowers the sum of the errors most for its cost is taken, as long as there is room.

    Args:
        model: is not changed.
        configs: of different bits, unless bytes are given.
        calibration, filter_fn, progress: as in ``quantize_``.
        average_bits: of all weights of the layers, at most.
        max_bytes: instead, of the layers in memory, at most, with scales and the like: types of
            GGUF say, as codes of 2 and 3 bits take the room of 4.

    Returns:
        names and configs: a mixture that ``quantize_`` takes.

    Raises:
        ValueError: both or neither of the limits, configs of equal bits, an average below the
            fewest, bytes that no choice fits, or no layer; and what ``quantize_`` raises for layers
            that cannot be quantised.
    """
    if (average_bits is None) == (max_bytes is None):
        raise ValueError(
            "choose_configs: either average_bits or max_bytes is needed, "
            f"got {average_bits} and {max_bytes}"
        )
    options = sorted(configs, key=lambda config: config.bits)
    bits = [config.bits for config in options]
    alike = len(set(bits)) != len(bits)
    if not bits or (average_bits is not None and (alike or average_bits < bits[0])):
        raise ValueError(
            "choose_configs: configs must differ in bits, and average_bits be at least the fewest, "
            f"got {bits} and {average_bits}"
        )
    targets, _ = find_targets(model, options[0], filter_fn)
    if not targets:
        raise ValueError("choose_configs: the model has no linear layer to quantise")
    found = measure_layers(model, targets, options, Calibration.of(calibration), progress)
    errors = {name: [r.output_error or 0.0 for r in results] for name, results in found.items()}
    if average_bits is None:
        costs = {name: [r.bytes for r in results] for name, results in found.items()}
        budget: float = max_bytes or 0
        least = sum(map(min, costs.values()))
        if budget < least:
            raise ValueError(f"choose_configs: max_bytes must be at least {least}, got {max_bytes}")
    else:
        sizes = {target.names[0]: target.linear.weight.numel() for target in targets}
        costs = {name: [number * size for number in bits] for name, size in sizes.items()}
        budget = average_bits * sum(sizes.values())
    return {name: options[index] for name, index in allocate(errors, costs, budget).items()}


def allocate(
    errors: dict[str, list[float]], costs: dict[str, list[int]], budget: float
) -> dict[str, int]:
    """For each layer the index of one of its options, greedily by error per cost.

    Args:
        errors: of each layer, for each option.
        costs: likewise; their sum may be as much as ``budget``, or else the least there is.
    """
    chosen = {name: min(zip(costs[name], errors[name], count()))[2] for name in errors}
    left = budget - sum(costs[name][index] for name, index in chosen.items())

    def steps() -> Iterable[tuple[float, str, int, float]]:
        for name, index in chosen.items():
            for after, error in enumerate(errors[name]):
                cost = costs[name][after] - costs[name][index]
                gain = errors[name][index] - error
                if cost <= left and gain > 0:
                    yield gain / cost if cost > 0 else inf, name, after, cost

    while best := max(steps(), default=None):
        _, name, index, cost = best
        chosen[name] = index
        left -= cost
    return chosen


def measure_layers(
    model: nn.Module,
    targets: list[Target],
    options: list[Method],
    calibration: Calibration,
    progress: bool,
) -> dict[str, list[LayerResult]]:
    """What each layer, quantised alone, becomes with each config, on inputs of the model as it is.

    The model's blocks run one after the other, and it stays as it was.
    """
    names = {target.linear: target.names for target in targets}
    found: dict[str, list[LayerResult]] = {}

    def measure(module: nn.Module, batches: Pass) -> None:
        groups = [
            group
            for group in trace_inputs(module, batches)
            if any(x in names and names[x][0] not in found for x in group.linears)
        ]
        for group in groups:
            inputs = collect([group], batches)[0]
            for linear in group.linears:
                if linear in names:
                    found[names[linear][0]] = [
                        quantise_alone(Target(linear, names[linear], method), inputs)
                        for method in options
                    ]

    with evaluating(model):
        _, blocks = find_blocks(model)
        stream = BlockStream.of(model, blocks, calibration) if blocks else None
        if stream is not None:
            bar = tqdm(blocks, desc="sensitivity", unit="block", leave=False, disable=not progress)
            for i, block in enumerate(bar):
                measure(block, partial(stream.run, i, block))
                stream.advance(i, block)
        if any(target.names[0] not in found for target in targets):
            measure(model, whole_pass(calibration, model))
    return found
