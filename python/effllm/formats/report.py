"""What a checkpoint holds and what runs each layer: the load report, and ``inspect``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from effllm.formats.checkpoint import Checkpoint, CheckpointError, TensorInfo
from effllm.formats.config import read_config
from effllm.formats.grouped import checked_groups
from effllm.formats.layers import StoredLayer, find_layers, kernel_name


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


def inspect(path: str | Path) -> LoadReport:
    """What ``effllm.load(path)`` would load, from headers and configs alone; bytes are on disk.

    Reads no weight, needs no transformers and allocates next to nothing.

    Raises:
        FileNotFoundError: no such folder, or no safetensors file in it.
        CheckpointError: see ``effllm.load``.
    """
    checkpoint = Checkpoint(path)
    stored = find_layers(checkpoint, read_config(checkpoint.folder))
    layers, seen = [], set()
    for layer in stored.values():
        names = layer.tensors(checkpoint)
        bias = f"{layer.name}.bias"
        names += [bias] if bias in checkpoint.tensors else []
        seen.update(names)
        size = sum(_num_bytes(checkpoint.tensors[name]) for name in names)
        layers.append(stored_report(layer, _stored_groups(checkpoint, layer), size))
    other_bytes = 0
    for name, info in checkpoint.tensors.items():
        if name in seen:
            continue
        if len(info.shape) == 2:
            row = name.removesuffix(".weight")
            kind, bits = info.dtype.lower(), _element_bits(info)
            layers.append(LayerReport(row, kind, bits, None, "dense", _num_bytes(info)))
        else:
            other_bytes += _num_bytes(info)
    return LoadReport(tuple(layers), other_bytes)


def stored_report(layer: StoredLayer, groups: torch.Tensor, size: int) -> LayerReport:
    """The row of a quantised layer whose input channels have these groups."""
    scheme = layer.scheme
    group_size = layer.in_features if scheme.group_size == -1 else scheme.group_size
    kernel = kernel_name(scheme.bits, groups, group_size)
    return LayerReport(layer.name, scheme.format, scheme.bits, group_size, kernel, size)


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


def _stored_groups(checkpoint: Checkpoint, layer: StoredLayer) -> torch.Tensor:
    k = layer.in_features
    group_size = k if layer.scheme.group_size == -1 else layer.scheme.group_size
    for part in ("g_idx", "weight_g_idx"):
        name = f"{layer.name}.{part}"
        if name in layer.tensors(checkpoint):
            g_idx = checkpoint.read(name, (k,), ("I32", "I64"))
            if part == "weight_g_idx" and bool((g_idx == -1).all()):
                break
            try:
                groups = checked_groups(g_idx, -(-k // group_size), k, group_size)
            except ValueError as error:
                raise CheckpointError(
                    f"{checkpoint.folder}: layer '{layer.name}': {error}"
                ) from error
            if groups is not None:
                return groups
    return torch.arange(k) // group_size


def _element_bits(info: TensorInfo) -> int:
    """Of a dtype as safetensors spells it: BF16, I32, F8_E4M3, BOOL."""
    digits = re.search(r"\d+", info.dtype)
    return 8 if digits is None else int(digits[0])


def _num_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * _element_bits(info) // 8


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
