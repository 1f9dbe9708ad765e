"""quantize_: swaps the linear layers of a model for quantised ones, in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from effllm.quantization.calibration import Batch, Calibration
from effllm.quantization.configs import Int4Config
from effllm.quantization.engine import quantise_with_calibration
from effllm.quantization.method import Method
from effllm.quantization.quantize_layer import quantise_layer
from effllm.quantization.report import QuantizationReport, progress_bar, show_layer
from effllm.quantization.state import RunState
from effllm.quantization.targets import Filter, Mixture, Target, find_targets

_logger = logging.getLogger(__name__)


def quantize_(
    model: nn.Module,
    config: Method | Mixture | None = None,
    filter_fn: Filter | None = None,
    *,
    calibration: Tensor | Iterable[Batch] | None = None,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Replaces every ``nn.Linear`` inside ``model`` by a quantised layer, in place.

    Args:
        model: on CPU or GPU, not on meta.
        config: how; defaults to ``Int4Config()``. A mapping from patterns of module names
            (``"*.mlp.*"``, as ``fnmatch`` takes them) to configs mixes several: the first match
            decides, None leaves a layer as it is, and so does no match.
        filter_fn: ``filter_fn(module, name) -> bool`` picks among the layers found.
        calibration: what methods that look at inputs learn from: token ids int64 ``[B, T]``, or an
            iterable of batches, each the model's only argument or a mapping of its keyword
            arguments; tokens that an ``attention_mask`` leaves out do not count. Layers are then
            quantised block by block, on inputs of the blocks that are done.
        state: a folder for finished blocks. The same call with the same folder, in another process
            say, goes on where this one was interrupted, and comes to the same weights. It may be
            removed when all is done.
        device: where to compute; None: where the model is. The model stays where it is, and its
            blocks go to the device and come back one at a time: there, memory holds the weights of
            one block, the statistics of one layer's inputs, and what one batch makes inside a
            block. Layers outside of the blocks (a head) are calibrated where the model is, and so
            is a model without a chain of blocks; without calibration layers go one at a time.
        progress: show a progress bar with the time left and the last layer's error.

    Returns:
        what became of each layer, with its error.

    A layer whose weight is shared with another module (a head tied to the embedding) is left as it
    is, and so are subclasses of ``nn.Linear``, whose forward may do more. Each layer is swapped in
    one assignment: after an error or Ctrl-C the model still runs, in part quantised. A model of
    transformers is saved by ``effllm.save`` from then on; its ``save_pretrained`` raises.

    Raises:
        ValueError: a layer cannot be quantised (the message names it), ``model`` itself is an
            ``nn.Linear`` and so has no parent to swap it in, a pattern matches no layer, a method
            needs calibration and gets none, ``state`` is of another run, torch has no such
            ``device`` here, or a model without blocks is to be calibrated on CUDA in float32, which
            its quantised layers do not take there.
    """
    if device is not None:
        device = usable_device(device)
    config = Int4Config() if config is None else config
    if type(model) is nn.Linear:
        raise ValueError(
            "effllm.quantize_: the model itself is an nn.Linear; use Int4Linear.from_linear(model)"
        )
    targets, skipped = find_targets(model, config, filter_fn)
    for name, why in skipped.items():
        _logger.info("effllm.quantize_: %s is left as it is: %s", name, why)
    report = QuantizationReport(skipped=skipped)
    if calibration is not None:
        data = Calibration.of(calibration)
        run_state = None if state is None else RunState(state)
        quantise_with_calibration(model, targets, data, run_state, device, report, progress)
        _refuse_plain_saving(model)
        return report
    for target in targets:
        if target.method.needs_calibration:
            raise ValueError(
                f"effllm.quantize_: {type(target.method).__name__} needs calibration data, "
                "got calibration=None"
            )
    if state is not None:
        raise ValueError("effllm.quantize_: state is of runs with calibration, got none")
    _quantise_by_weights(model, targets, device, report, progress)
    _refuse_plain_saving(model)
    return report


def usable_device(device: torch.device | str) -> torch.device:
    """The device. Raises ValueError for one that does not exist here, or holds no data."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"effllm.quantize_: device '{device}' cannot be used: {why}") from error
    if found.type == "meta":
        raise ValueError("effllm.quantize_: device must hold data, got 'meta'")
    return found


def _refuse_plain_saving(model: nn.Module) -> None:
    """``save_pretrained`` would write packed tensors that no config tells how to read."""
    if hasattr(model, "save_pretrained"):
        # Imported here, as it imports transformers, which such a model comes from.
        from effllm.integrations.quantizer import refuse_save_pretrained

        refuse_save_pretrained(model)


def _quantise_by_weights(
    model: nn.Module,
    targets: list[Target],
    device: torch.device | None,
    report: QuantizationReport,
    progress: bool,
) -> None:
    """Layer by layer, for methods that look at nothing but the weight."""
    with progress_bar(len(targets), progress) as bar:
        for target in targets:
            work = target
            if device is not None:
                work = Target(copy.deepcopy(target.linear).to(device), target.names, target.method)
            layer, result = quantise_layer(work, None)
            layer.to(target.linear.weight.device)
            for name in target.names:
                model.set_submodule(name, layer)
            report.layers.append(result)
            show_layer(bar, result)
