"""A model out of a GGUF file and into one: what effllm.load, save and inspect do with it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from effllm.formats.empty import empty_model, finish_model, import_extra
from effllm.formats.gguf import (
    GgufError,
    GgufFile,
    TensorType,
    int4_layers,
    read_config,
    read_state_dict,
    tokenizer_metadata,
    write_model,
)
from effllm.formats.gguf.architecture import Slot, slots
from effllm.formats.gguf.config import end_tokens
from effllm.formats.gguf.layout import BLOCK_TYPES
from effllm.formats.report import LayerReport, LoadReport, model_report
from effllm.nn import GgufLinear, Int4Linear
from effllm.nn.gguf_linear import LAYOUTS
from effllm.nn.quantized_linear import QuantizedLinear

GGUF_FORMATS = {
    f"gguf-{kind.name.lower()}": kind
    for kind in (
        TensorType.Q4_0,
        TensorType.Q4_1,
        TensorType.Q8_0,
        TensorType.Q4_K,
        TensorType.Q6_K,
        TensorType.F16,
        TensorType.BF16,
        TensorType.F32,
    )
}
"""Formats of ``effllm.save``, and the type of the matrices."""

_GROUP_SIZE = 32
_DTYPES = {TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}


def is_gguf(path: str | Path) -> bool:
    """Whether a path is meant as a GGUF file: by its name, as folders are the rule."""
    return Path(path).suffix.lower() == ".gguf"


def load_gguf(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: bool,
    options: dict[str, Any],
) -> Any:
    """See ``effllm.load``. ``dtype`` None is that of the embedding, or bfloat16."""
    file = GgufFile(path)
    config = _config(file)
    dtype = dtype or _DTYPES.get(file.tensors["token_embd.weight"].type, torch.bfloat16)
    ends = end_tokens(file, config.vocab_size)
    entries = read_state_dict(file, dtype=dtype)
    first = next(entries)  # all checks of the file come before it, and so before the model
    model = empty_model(config, str(path), dtype, options)
    kinds = {slot.module: file.tensors[slot.gguf].type for slot in _quantised(file)}
    packed = set()
    bar = tqdm(
        chain([first], entries),
        total=len(file.tensors),
        desc="load",
        unit="tensor",
        leave=False,
        disable=not progress,
    )
    for key, tensor in bar:
        owner, _, attribute = key.rpartition(".")
        if attribute == "qweight":  # the first entry of a packed layer
            model.set_submodule(owner, _empty(model.get_submodule(owner), kinds[owner]))
            packed.add(owner)
        module = model.get_submodule(owner)
        old = getattr(module, attribute)  # None: zero points, where there are any
        trains = old is not None and old.requires_grad
        setattr(module, attribute, nn.Parameter(tensor.to(device), requires_grad=trains))
    model.tie_weights()
    model.to(device)  # the buffers
    rows = [
        _row(
            file, slot, packed, sum(p.nbytes for p in model.get_submodule(slot.module).parameters())
        )
        for slot in _quantised(file)
    ]
    if len(ends) > 1:
        model.generation_config.eos_token_id = ends
    return finish_model(model, model_report(model, rows))


def save_gguf(
    model: Any, path: Path, tensor_type: TensorType, tokenizer: Any, progress: bool
) -> None:
    """See ``effllm.save``."""
    if not is_gguf(path):
        raise ValueError(f"effllm.save: a GGUF file must be named *.gguf, got {path}")
    if path.exists():
        raise FileExistsError(f"effllm.save: {path} exists")
    metadata = {}
    if tokenizer is not None:
        metadata = tokenizer_metadata(tokenizer, model.config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_model(path, model, tensor_type, metadata, progress=progress)


def inspect_gguf(path: str | Path) -> LoadReport:
    """See ``effllm.formats.inspect``."""
    file = GgufFile(path)
    wanted = list(slots(read_config(file)))
    packed = set(int4_layers(file))
    packed |= {s.module for s in wanted if s.linear and file.tensors[s.gguf].type in BLOCK_TYPES}
    rows, other_bytes = [], 0
    for slot in wanted:
        info = file.tensors[slot.gguf]
        size = info.end - info.start
        if len(slot.shape) == 2:
            rows.append(_row(file, slot, packed, size))
        else:
            other_bytes += size
    return LoadReport(tuple(rows), other_bytes)


def _config(file: GgufFile) -> Any:
    fields = read_config(file)
    try:
        return import_extra("transformers").AutoConfig.for_model(**fields)
    except ImportError:
        raise
    except Exception as error:  # a class per model, each with its own checks
        raise GgufError(
            f"{file.path}: not a config that transformers takes: {type(error).__name__}: {error}"
        ) from error


def _empty(linear: nn.Linear, kind: TensorType) -> QuantizedLinear:
    """The layer for codes of the type."""
    sizes = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    if kind in BLOCK_TYPES:
        return GgufLinear(*sizes, bias=bias, tensor_type=BLOCK_TYPES[kind], device="meta")
    return Int4Linear(*sizes, bias=bias, group_size=_GROUP_SIZE, device="meta")


def _quantised(file: GgufFile) -> Iterator[Slot]:
    """The matrices that are stored in blocks."""
    for slot in slots(read_config(file)):
        if len(slot.shape) == 2 and file.tensors[slot.gguf].type.block_values > 1:
            yield slot


def _row(file: GgufFile, slot: Slot, packed: Container[str], size: int) -> LayerReport:
    kind = file.tensors[slot.gguf].type
    digits = re.search(r"\d+", kind.name)
    assert digits is not None  # of every type that can be decoded
    block = kind.block_values
    if slot.module in packed:
        kernel = "int4_gemm"
    else:
        kernel = "dense" if block == 1 else f"dense ({kind.name})"
    group_size = None if block == 1 else _GROUP_SIZE if slot.module in packed else block
    if slot.module in packed and kind in BLOCK_TYPES:
        group_size = LAYOUTS[BLOCK_TYPES[kind]].run
    return LayerReport(slot.module, kind.name.lower(), int(digits[0]), group_size, kernel, size)
