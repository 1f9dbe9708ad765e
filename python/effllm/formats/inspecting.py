"""effllm.formats.inspect: what is in a checkpoint, without loading it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from effllm.formats.checkpoint import Checkpoint, CheckpointError, TensorInfo
from effllm.formats.config import read_config
from effllm.formats.gguf_model import inspect_gguf, is_gguf
from effllm.formats.grouped import checked_groups
from effllm.formats.layers import GROUPED, StoredLayer, find_layers, unused_scales
from effllm.formats.report import LayerReport, LoadReport, stored_report


def inspect(path: str | Path) -> LoadReport:
    """What ``effllm.load(path)`` would load, from headers and configs alone; bytes are on disk.

    Reads no weight but those of type Q4_1 in a GGUF file, needs no transformers and allocates next
    to nothing.

    Raises:
        FileNotFoundError: no such folder, or no safetensors file in it.
        CheckpointError: see ``effllm.load``.
    """
    if is_gguf(path):
        return inspect_gguf(path)
    checkpoint = Checkpoint(path)
    config = read_config(checkpoint.folder)
    stored = find_layers(checkpoint, config)
    layers, seen = [], set()
    for layer in stored.values():
        names = layer.tensors(checkpoint)
        bias = f"{layer.name}.bias"
        names += [bias] if bias in checkpoint.tensors else []
        seen.update(names)
        size = sum(_num_bytes(checkpoint.tensors[name]) for name in names)
        layers.append(stored_report(layer, _stored_groups(checkpoint, layer), size))
    other_bytes = 0
    unused = unused_scales(checkpoint, config)
    for name, info in checkpoint.tensors.items():
        if name in seen:
            continue
        if len(info.shape) == 2 and name not in unused:
            row = name.removesuffix(".weight")
            kind, bits = info.dtype.lower(), _element_bits(info)
            layers.append(LayerReport(row, kind, bits, None, "dense", _num_bytes(info)))
        else:
            other_bytes += _num_bytes(info)
    return LoadReport(tuple(layers), other_bytes)


def _stored_groups(checkpoint: Checkpoint, layer: StoredLayer) -> torch.Tensor | None:
    """The groups of the input channels; None for formats whose codes are not integers in words."""
    if layer.scheme.format not in GROUPED:
        return None
    k, group_size = layer.in_features, layer.group_size
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
