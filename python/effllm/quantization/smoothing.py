"""SmoothQuant: outliers of activations moved into weights, where that changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from effllm.quantization.blocks import BlockStream, evaluating, find_blocks
from effllm.quantization.calibration import Batch, Calibration
from effllm.quantization.collecting import Pass, collect, trace_inputs, whole_pass
from effllm.quantization.folding import Fold, find_folds
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.targets import sharing_modules

_SMALLEST = 1e-5
_LARGEST_CODE = 127
_ALPHAS = [step / 20 for step in range(21)]


def smooth_(
    model: nn.Module,
    calibration: Tensor | Iterable[Batch],
    *,
    alpha: float | None = 0.5,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: bool = True,
) -> dict[str, list[str]]:
    """Evens out what linear layers get, in place: the model computes what it did.

    After Xiao et al., SmoothQuant (arXiv:2211.10438), equation 4: input channel j is divided by
    ``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)``, and column j of the layers multiplied by it.
    The division goes into the norm or linear layer before, wherever that is exact, which is tried
    (see ``folding``). Channels that are always zero, or have no weight, keep their scale.

    Args:
        model: its weights are on the device that shall compute.
        calibration: as in ``quantize_``.
        alpha: 0 leaves outliers to activations, 1 to weights; None takes, for each input, the
            twentieth with the least error that 8 bits of both are expected to make.
        filter_fn: ``filter_fn(module, name) -> bool``: layers whose input shall be smoothed. Layers
            that share an input are smoothed together, if one of them is chosen.
        progress: show a progress bar.

    Returns:
        names of the modules that took over scales, each with those of the layers it took them from.

    Raises:
        ValueError: alpha outside of 0..1, or calibration data that ``quantize_`` refuses.
    """
    check_alpha("smooth_", alpha)
    data = Calibration.of(calibration)
    names = {module: name for name, module in model.named_modules()}
    chosen = {
        module
        for module, name in names.items()
        if type(module) is nn.Linear and (filter_fn is None or filter_fn(module, name))
    }
    fixed = {model.get_submodule(name) for name in sharing_modules(model)}
    folded: dict[str, list[str]] = {}

    def smooth_part(module: nn.Module, batches: Pass) -> None:
        groups = trace_inputs(module, batches)
        wanted = [group for group in groups if chosen.intersection(group.linears)]
        if not wanted:
            return
        folds = find_folds(module, groups, wanted, batches, fixed)
        found = collect([group for group, _ in folds], batches)
        for (_, fold), inputs in zip(folds, found, strict=True):
            best = find_alpha(fold, inputs) if alpha is None else alpha
            fold.apply(smoothing_scales(fold, inputs, best))
            folded[names[fold.producer]] = [names[linear] for linear in fold.consumers]

    with evaluating(model):
        _, blocks = find_blocks(model)
        stream = BlockStream.of(model, blocks, data) if blocks else None
        if stream is None:
            smooth_part(model, whole_pass(data, model))
            return folded
        bar = tqdm(blocks, desc="smooth", unit="block", leave=False, disable=not progress)
        for i, block in enumerate(bar):
            smooth_part(block, partial(stream.run, i, block))
            stream.advance(i, block)
    return folded


def check_alpha(where: str, alpha: float | None) -> None:
    """Raises ValueError for an exponent outside of 0..1."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"{where}: alpha must be in 0..1, got {alpha}")


def smoothing_scales(fold: Fold, inputs: InputStatistics, alpha: float) -> Tensor:
    """Factors ``[P]``, fp32, for the columns of the fold's layers."""
    weights = torch.stack([linear.weight.abs().amax(0) for linear in fold.consumers]).amax(0)
    # Channels with a common factor go by the largest of them.
    x, w = (fold.largest(peaks.float()) for peaks in (inputs.peak, weights))
    scales = x.clamp(min=_SMALLEST) ** alpha / w.clamp(min=_SMALLEST) ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), scales, torch.ones_like(scales))


def find_alpha(fold: Fold, inputs: InputStatistics) -> float:
    """The exponent with the least expected error of the fold's outputs at 8 bits, each layer's over
    its own energy.

    Weights are rounded, with a scale for each row, and their error is that over the inputs seen.
    Inputs have one scale for all; a rounded value is off by a twelfth of a step squared on average.
    """
    weights = [linear.weight.detach().float() for linear in fold.consumers]
    energies = [inputs.output_energy(weight) or 1.0 for weight in weights]

    def error(alpha: float) -> float:
        scales = fold.spread(smoothing_scales(fold, inputs, alpha))
        step = float((inputs.peak / scales).max()) / _LARGEST_CODE
        total = 0.0
        for weight, energy in zip(weights, energies, strict=True):
            scaled = weight * scales
            steps = (scaled.abs().amax(1, keepdim=True) / _LARGEST_CODE).clamp(min=1e-30)
            rounded = torch.round(scaled / steps) * steps
            by_weights = inputs.output_energy((rounded - scaled) / scales)
            by_inputs = inputs.tokens * step**2 / 12 * float(rounded.double().square().sum())
            total += (by_weights + by_inputs) / energy
        return total

    return min(_ALPHAS, key=error)
