"""What a checkpoint holds and what runs each layer: the rows and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from effllm.formats.layers import StoredLayer
from effllm.formats.weights import kernel_name


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one unquantised matrix.

    Attributes:
        name: of the module, or of the tensor without ``.weight``.
        format: as in ``quantization_config``, or the dtype of an unquantised matrix.
        bits: of a code or an element.
        group_size: input channels per scale; None for unquantised matrices.
        kernel: the op that multiplies by it, or "dense" with the reason for a quantised layer.
        bytes: of all of the layer's tensors.
    """

    name: str
    format: str
    bits: int
    group_size: int | None
    kernel: str
    bytes: int


@dataclass(frozen=True)
class LoadReport:
    """All layers, in the checkpoint's order; ``str()`` is a table.

    Attributes:
        layers: the quantised layers and all other matrices.
        other_bytes: of norms, biases of unquantised layers and the like.
    """

    layers: tuple[LayerReport, ...]
    other_bytes: int

    @property
    def bytes(self) -> int:
        """Of everything."""
        return self.other_bytes + sum(layer.bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "format", "bits", "group", "kernel", "bytes")]
        for layer in self.layers:
            group = "" if layer.group_size is None else str(layer.group_size)
            size = f"{layer.bytes:,}"
            rows.append((layer.name, layer.format, str(layer.bits), group, layer.kernel, size))
        rows.append(("(other tensors)", "", "", "", "", f"{self.other_bytes:,}"))
        rows.append(("total", "", "", "", "", f"{self.bytes:,}"))
        return _table(rows)


def stored_report(layer: StoredLayer, groups: torch.Tensor | None, size: int) -> LayerReport:
    """The row of a quantised layer; ``groups`` as ``kernel_name`` takes them."""
    scheme = layer.scheme
    kernel = kernel_name(layer, groups)
    return LayerReport(layer.name, scheme.format, scheme.bits, layer.group_size, kernel, size)


def model_report(model: nn.Module, quantised: Sequence[LayerReport]) -> LoadReport:
    """The report of a loaded model; bytes are in memory, of a shared matrix once.

    ``quantised`` are the rows of the layers that came quantised.
    """
    rows = list(quantised)
    inside = {f"{row.name}." for row in rows}
    other_bytes = sum(buffer.nbytes for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        if f"{name.rpartition('.')[0]}." in inside:
            continue
        if parameter.dim() == 2:
            row = name.removesuffix(".weight")
            kind = str(parameter.dtype).removeprefix("torch.")
            bits = 8 * parameter.element_size()
            rows.append(LayerReport(row, kind, bits, None, "dense", parameter.nbytes))
        else:
            other_bytes += parameter.nbytes
    return LoadReport(tuple(rows), other_bytes)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = {2, 3, len(widths) - 1}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
