"""Quantisation with calibration data: block by block, each on inputs of the quantised ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from effllm.quantization.blocks import BlockStream, copied, decoded, evaluating, find_blocks
from effllm.quantization.calibration import Calibration
from effllm.quantization.collecting import (
    InputGroup,
    Pass,
    collect,
    trace_inputs,
    whole_pass,
)
from effllm.quantization.folding import find_folds
from effllm.quantization.method import Method
from effllm.quantization.quantize_layer import quantise_layer
from effllm.quantization.report import QuantizationReport, progress_bar, show_layer
from effllm.quantization.state import PartResult, RunState, fingerprint
from effllm.quantization.targets import Target, sharing_modules


@dataclass(frozen=True)
class _Part:
    """What is calibrated at once: a block, or what the model has beside its blocks.

    Attributes:
        name: of the module in the model; "" for the model itself.
        module: that holds all targets.
        targets: layers of the module; names are those in the model.
        passes: gives the batches, to be run through the module that it is called with.
        sharing: names of modules in the model that share parameters with others.
        device: where it is computed; None: where it is.
    """

    name: str
    module: nn.Module
    targets: list[Target]
    passes: Callable[[nn.Module], Pass]
    sharing: set[str]
    device: torch.device | None

    def local(self, name: str) -> str:
        """A module's name inside the part."""
        return name.removeprefix(f"{self.name}.") if self.name else name

    def full(self, name: str) -> str:
        """The name in the model of a module inside the part."""
        return f"{self.name}.{name}".strip(".")

    def holds(self, name: str) -> bool:
        """Whether the module of this name is inside: a layer may be used elsewhere as well."""
        return not self.name or name.startswith(f"{self.name}.")


def quantise_with_calibration(
    model: nn.Module,
    targets: list[Target],
    calibration: Calibration,
    state: RunState | None,
    device: torch.device | None,
    report: QuantizationReport,
    progress: bool,
) -> None:
    """Quantises the targets block by block, then those outside of the blocks.

    Only the inputs of one block are in memory, for all batches. With a ``device`` one block at a
    time is there, and the inputs of one batch; what is outside of the blocks is computed where the
    model is, which may not fit there. A block is quantised on a copy and
    then changed in one go, so that an interrupt leaves each block as it was or done; called again,
    the function goes on with the next one and comes to the same result.
    """
    name, blocks = find_blocks(model)
    _refuse_float32_on_cuda(blocks, targets)
    bar = progress_bar(len(targets), progress)
    sharing = sharing_modules(model)
    with evaluating(model), bar:
        last = max((i for i, b in enumerate(blocks) if _inside(b, targets)), default=-1)
        stream = BlockStream.of(model, blocks, calibration, device) if last >= 0 else None
        done: set[Target] = set()
        if stream is not None:
            for i, block in enumerate(blocks[: last + 1]):
                part = _block_part(f"{name}.{i}", i, block, targets, stream, sharing, device)
                _finish(model, part, i, calibration, state, report, bar)
                done.update(part.targets)
                if i < last:
                    dtypes = {
                        part.local(name): target.linear.weight.dtype
                        for target in part.targets
                        for name in filter(part.holds, target.names)
                    }
                    stream.advance(i, decoded(block, device, dtypes))
        rest = [target for target in targets if target not in done]
        part = _Part("", model, rest, partial(whole_pass, calibration), sharing, None)
        _finish(model, part, len(blocks), calibration, state, report, bar)


def _refuse_float32_on_cuda(blocks: Sequence[nn.Module], targets: list[Target]) -> None:
    """Layers outside of blocks run quantised for those behind them: in 16 bits on a GPU."""
    in_blocks = {target for block in blocks for target in _inside(block, targets)}
    outside = [target for target in targets if target not in in_blocks]
    for target in outside[:-1]:
        weight = target.linear.weight
        if weight.dtype == torch.float32 and weight.device.type == "cuda":
            raise ValueError(
                f"effllm.quantize_: layer '{target.names[0]}' is in no block and has float32 "
                f"weights on {weight.device}, where calibration needs float16 or bfloat16: use "
                "model.to(torch.bfloat16), or the CPU"
            )


def _inside(block: nn.Module, targets: list[Target]) -> list[Target]:
    modules = set(block.modules())
    return [target for target in targets if target.linear in modules]


def _block_part(
    name: str,
    index: int,
    block: nn.Module,
    targets: list[Target],
    stream: BlockStream,
    sharing: set[str],
    device: torch.device | None,
) -> _Part:
    def passes(module: nn.Module) -> Pass:
        return partial(stream.run, index, module)

    return _Part(name, block, _inside(block, targets), passes, sharing, device)


def _finish(
    model: nn.Module,
    part: _Part,
    index: int,
    calibration: Calibration,
    state: RunState | None,
    report: QuantizationReport,
    bar: Any,
) -> None:
    """Quantises a part, or takes it from the state, and puts it into the model."""
    if not part.targets:
        return
    result = None
    if state is not None:
        mark = fingerprint(part.module, part.targets, calibration.digest)
        result = state.load(index, mark, part.targets)
    if result is None:
        result = _quantise_part(part, bar)
        if state is not None:
            state.store(index, mark, result)
    else:
        bar.update(len(part.targets))
    for name, tensor in result.changed.items():
        model.get_parameter(name).data.copy_(tensor)
    for target in part.targets:
        _install(model, target, result.layers[target.names[0]])
    report.layers += result.results
    report.folded |= result.folded


def _install(model: nn.Module, target: Target, layer: nn.Module) -> None:
    for name in target.names:
        model.set_submodule(name, layer)


def _quantise_part(part: _Part, bar: Any) -> PartResult:
    """Group by group of layers with a common input, on inputs of those that are done."""
    # There is no second copy of a whole model; its few layers beside blocks are swapped at once.
    work = copied(part.module, part.device) if part.name else part.module
    targets = {
        work.get_submodule(part.local(next(filter(part.holds, target.names)))): target
        for target in part.targets
    }
    result = PartResult({}, [], {}, {})
    batches = part.passes(work)
    groups = trace_inputs(work, batches)
    _scale_inputs(work, groups, targets, batches, part, result)
    for group in groups:
        if any(linear in targets for linear in group.linears):
            _quantise_group(work, group, targets, batches, part, result, bar)
    return result


def _scale_inputs(
    work: nn.Module,
    groups: list[InputGroup],
    targets: dict[nn.Module, Target],
    batches: Pass,
    part: _Part,
    result: PartResult,
) -> None:
    """Scales the inputs of layers whose method asks for it, and notes what else has changed."""

    def methods(group: InputGroup) -> set[Method]:
        found = {targets[linear].method for linear in group.linears if linear in targets}
        return {method for method in found if method.scales_inputs}

    # The scales are for one method; there is one input.
    wanted = [group for group in groups if len(methods(group)) == 1]
    if not wanted:
        return
    names = {module: part.full(name) for name, module in work.named_modules()}
    fixed = {module for module, name in names.items() if name in part.sharing}
    folds = find_folds(work, groups, wanted, batches, fixed)
    statistics = collect([group for group, _ in folds], batches)
    for (group, fold), inputs in zip(folds, statistics, strict=True):
        (method,) = methods(group)
        weights = [
            linear.weight.detach()
            for linear in group.linears
            if linear in targets and targets[linear].method == method
        ]
        fold.apply(method.input_scales(weights, inputs, fold))
        result.folded[names[fold.producer]] = [names[linear] for linear in group.linears]
        for module in (fold.producer, *group.linears):
            if module not in targets:
                for key, parameter in module.named_parameters(recurse=False):
                    result.changed[f"{names[module]}.{key}"] = parameter.detach()


def _quantise_group(
    work: nn.Module,
    group: InputGroup,
    targets: dict[nn.Module, Target],
    batches: Pass,
    part: _Part,
    result: PartResult,
    bar: Any,
) -> None:
    inputs = collect([group], batches)[0]
    for linear in group.linears:
        target = targets.get(linear)
        if target is None:
            continue
        here = Target(linear, target.names, target.method)
        layer, found = quantise_layer(here, inputs)
        # The groups that follow get what the quantised layer computes.
        if part.name:
            linear.weight.copy_(layer.weight)
        else:
            _install(work, target, layer)
        # The block's dense weights are all that stays on the device.
        result.layers[target.names[0]] = layer.to(target.linear.weight.device)
        result.results.append(found)
        show_layer(bar, found)
