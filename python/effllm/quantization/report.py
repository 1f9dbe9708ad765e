"""What ``quantize_`` has done: one line for each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        name: of the module in the model; the first one if it has several.
        method: name of the method.
        bits: of a code.
        granularity: of scales or codebooks.
        weight_error: squared error of the weight over its squared norm.
        output_error: the same of the layer's output over the calibration tokens, both with the
            inputs of the model as quantised so far; None without calibration.
        tokens: of the calibration that reached the layer.
        bytes: of the layer in memory, codes and all that belongs to them, without its bias.
    """

    name: str
    method: str
    bits: int
    granularity: str
    weight_error: float
    output_error: float | None = None
    tokens: int = 0
    bytes: int = 0


@dataclass
class QuantizationReport:
    """What became of a model.

    Attributes:
        layers: the quantised ones, in the order in which it was done.
        skipped: names of linear layers that were left as they are, with the reason.
        folded: norms and layers whose weights took over scales, with those they took them from.
    """

    layers: list[LayerResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    folded: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table of the layers, errors as fractions, and the skipped ones."""
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  method   bits  granularity   weight error  output error"]
        for layer in self.layers:
            output = "" if layer.output_error is None else f"{layer.output_error:.3e}"
            lines.append(
                f"{layer.name:<{width}}  {layer.method:<8} {layer.bits:>4}  "
                f"{layer.granularity:<12}  {layer.weight_error:>12.3e}  {output:>12}"
            )
        lines += [f"{name}: left as it is ({why})" for name, why in self.skipped.items()]
        return "\n".join(lines)


def progress_bar(layers: int, shown: bool) -> Any:
    """One that shows the time left, to be used with ``show_layer``; none if there are no layers."""
    disabled = not (shown and layers)
    return tqdm(total=layers, desc="quantize", unit="layer", leave=False, disable=disabled)


def show_layer(bar: Any, layer: LayerResult) -> None:
    """One more is done: its name and the error of its output, without calibration its weight's."""
    error = layer.weight_error if layer.output_error is None else layer.output_error
    bar.set_postfix(layer=layer.name, error=f"{error:.2e}", refresh=False)
    bar.update()
