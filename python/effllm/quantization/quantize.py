"""quantize_: swaps the linear layers of a model for quantised ones, in place."""

from __future__ import annotations

import logging

from torch import nn
from tqdm import tqdm

from effllm.quantization.configs import Int4Config
from effllm.quantization.method import Method
from effllm.quantization.quantize_layer import quantise_layer
from effllm.quantization.report import QuantizationReport
from effllm.quantization.targets import Filter, Mixture, Target, find_targets

_logger = logging.getLogger(__name__)


def quantize_(
    model: nn.Module,
    config: Method | Mixture | None = None,
    filter_fn: Filter | None = None,
    *,
    progress: bool = True,
) -> QuantizationReport:
    """Replaces every ``nn.Linear`` inside ``model`` by a layer over 4-bit codes, in place.

    Args:
        model: its weights are on the device that shall compute (CPU or GPU), not on meta.
        config: how; defaults to ``Int4Config()``. A mapping from patterns of module names
            (``"*.mlp.*"``, as ``fnmatch`` takes them) to configs mixes several: the first match
            decides, None leaves a layer as it is, and so does no match.
        filter_fn: ``filter_fn(module, name) -> bool`` picks among the layers found.
        progress: show a progress bar with the time left.

    Returns:
        what became of each layer, with its error.

    A layer whose weight is shared with another module (a head tied to the embedding) is left as it
    is, and so are subclasses of ``nn.Linear``, whose forward may do more. Each layer is swapped in
    one assignment: after an error or Ctrl-C the model still runs, in part quantised.

    Raises:
        ValueError: a layer cannot be quantised (the message names it), ``model`` itself is an
            ``nn.Linear`` and so has no parent to swap it in, or a pattern matches no layer.
    """
    config = Int4Config() if config is None else config
    if type(model) is nn.Linear:
        raise ValueError(
            "effllm.quantize_: the model itself is an nn.Linear; use Int4Linear.from_linear(model)"
        )
    targets, skipped = find_targets(model, config, filter_fn)
    for name, why in skipped.items():
        _logger.info("effllm.quantize_: %s is left as it is: %s", name, why)
    report = QuantizationReport(skipped=skipped)
    for target in targets:
        if target.method.needs_calibration:
            raise ValueError(
                f"effllm.quantize_: {type(target.method).__name__} needs calibration data, "
                "got calibration=None"
            )
    _quantise_by_weights(model, targets, report, progress)
    return report


def _quantise_by_weights(
    model: nn.Module, targets: list[Target], report: QuantizationReport, progress: bool
) -> None:
    """Layer by layer, for methods that look at nothing but the weight."""
    for target in tqdm(
        targets, desc="quantize", unit="layer", leave=False, disable=not (progress and targets)
    ):
        layer, result = quantise_layer(target, None)
        for name in target.names:
            model.set_submodule(name, layer)
        report.layers.append(result)
