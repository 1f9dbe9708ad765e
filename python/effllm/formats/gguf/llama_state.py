"""The weights of a Llama, tensor by tensor, out of a GGUF file and into one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effllm import ops
from effllm.formats.gguf.blocks import DECODED, dequantize, from_int4, names, to_int4
from effllm.formats.gguf.llama import (
    ROPE_FREQS,
    Slot,
    config_metadata,
    read_config,
    rope_freqs,
    slots,
    to_gguf_rows,
    to_hf_rows,
)
from effllm.formats.gguf.reader import GgufFile
from effllm.formats.gguf.spec import GgufError, TensorType, quote
from effllm.formats.gguf.writer import TensorSource, write_gguf

_GROUP = 32

# general.file_type, which llama.cpp shows and otherwise ignores.
_FILE_TYPES = {
    TensorType.F32: 0,
    TensorType.F16: 1,
    TensorType.Q4_0: 2,
    TensorType.Q8_0: 7,
    TensorType.BF16: 32,
}
_QUANTIZATION_VERSION = 2

_STORED = {TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}


def read_llama(
    file: GgufFile, *, int4: bool = True, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The entries of the Hugging Face state dict, one tensor in memory at a time.

    Args:
        file: of the architecture "llama"; its ``read_config`` is the model's config.
        int4: linear layers that ``int4_layers`` names come as the parameters of an ``Int4Linear``
            with groups of 32: ``<layer>.qweight`` int32, ``.scales`` fp16 and, where the zero point
            is not 8, ``.zeros`` uint8. Without, or for other layers, ``<layer>.weight``.
        dtype: of dense tensors. None keeps F32, F16 and BF16 as they are stored, and gives fp32,
            which is exact, for quantised types.

    Yields:
        (name, tensor) layer by layer, in memory of its own on the CPU. A tied head is left out.

    Raises:
        GgufError: before the first entry: see ``read_config``; a tensor is missing, unknown, of the
            wrong shape, or of a type without a decoder.
    """
    for slot in _checked_slots(file):
        info = file.tensors[slot.gguf]
        raw = _hf_raw(file, slot)
        converted = to_int4(raw, info.type, slot.shape) if int4 and slot.linear else None
        if converted is not None:
            codes, scales, zeros = converted
            yield f"{slot.module}.qweight", ops.int4_pack(codes)
            yield f"{slot.module}.scales", scales
            if zeros is not None:
                yield f"{slot.module}.zeros", zeros
            continue
        to = dtype or _STORED.get(info.type, torch.float32)
        yield f"{slot.module}.{slot.parameter}", dequantize(raw, info.type, slot.shape, to)


def int4_layers(file: GgufFile) -> dict[str, bool]:
    """The linear layers that ``read_llama`` gives as int4, and whether they have no zeros.

    Those stored as Q4_0, and those stored as Q4_1 if every block allows it (see
    ``blocks.to_int4``), for which the tensor is read. Raises as ``read_llama`` does.
    """
    found = {}
    for slot in _checked_slots(file):
        kind = file.tensors[slot.gguf].type
        if slot.linear and kind == TensorType.Q4_0:
            found[slot.module] = True
        elif slot.linear and to_int4(file.raw(slot.gguf), kind, slot.shape) is not None:
            found[slot.module] = False
    return found


def write_llama(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tensor_type: TensorType,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Llama as GGUF, whole or not at all.

    Args:
        path: replaced if it exists.
        state_dict: of a LlamaForCausalLM. Layers replaced by ``Int4Linear`` can be written as Q4_0,
            without loss, if they have groups of 32, fp16 scales and no zeros.
        config: ``model.config.to_dict()``.
        tensor_type: of all matrices: F32, F16, BF16, Q4_0 or Q8_0. Vectors are F32.
        metadata: more of it, such as the ``tokenizer.ggml`` keys that llama.cpp asks for; it wins
            over what follows from the config.

    Raises:
        GgufError: an entry is missing, unexpected or of the wrong shape, or cannot be stored as the
            type; the config cannot be expressed.
    """
    if tensor_type not in _FILE_TYPES:
        raise GgufError(f"{tensor_type.name} cannot be written, only {names(tuple(_FILE_TYPES))}")
    all_metadata = config_metadata(config)
    all_metadata["general.file_type"] = _FILE_TYPES[tensor_type]
    if tensor_type.block_values > 1:
        all_metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    sources = []
    freqs = rope_freqs(config["rope_parameters"], config["head_dim"])
    if freqs is not None:
        sources.append(TensorSource.of(ROPE_FREQS, freqs, TensorType.F32))
    # A tied head may be in the state dict; it is the embedding's tensor.
    used = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    for slot in slots(config):
        kind = tensor_type if len(slot.shape) == 2 else TensorType.F32
        keys, read = _entry(state_dict, slot, kind)
        used |= keys
        sources.append(TensorSource(slot.gguf, slot.shape, kind, read))
    unexpected = sorted(state_dict.keys() - used)
    if unexpected:
        raise GgufError(
            f"{len(unexpected)} entries of the state dict are not those of a Llama of this config, "
            f"such as {quote(unexpected[0])}"
        )
    write_gguf(path, all_metadata | dict(metadata or {}), sources)


def _checked_slots(file: GgufFile) -> list[Slot]:
    """The slots of the file's config, after checking that its tensors are just those."""
    wanted = {slot.gguf: slot for slot in slots(read_config(file))}
    for name in file.tensors.keys() - wanted.keys() - {ROPE_FREQS}:
        raise GgufError(f"{file.path}: tensor {quote(name)} is no part of a Llama")
    for name, slot in wanted.items():
        info = file.tensors.get(name)
        if info is None:
            raise GgufError(f"{file.path}: tensor '{name}' {list(slot.shape)} is missing")
        if info.shape != slot.shape:
            raise GgufError(
                f"{file.path}: tensor '{name}' must be {list(slot.shape)}, got {list(info.shape)}"
            )
        if info.type not in DECODED:
            raise GgufError(
                f"{file.path}: tensor '{name}' is {info.type.name}, only {names(DECODED)} can be "
                "decoded"
            )
        if slot.heads and len(info.shape) == 1 and info.type.block_values > 1:
            raise GgufError(
                f"{file.path}: tensor '{name}' is {info.type.name}, whose blocks would span rows"
            )
    return list(wanted.values())


def _hf_raw(file: GgufFile, slot: Slot) -> Tensor:
    """The stored bytes, rows in Hugging Face's order: whole rows move, whatever their type."""
    raw = file.raw(slot.gguf)
    return to_hf_rows(raw.view(slot.shape[0], -1), slot.heads) if slot.heads else raw


def _entry(
    state_dict: Mapping[str, Tensor], slot: Slot, kind: TensorType
) -> tuple[set[str], Callable[[], Tensor]]:
    """The keys that hold a slot, and a function that reads it for the file."""
    key = f"{slot.module}.{slot.parameter}"
    packed = f"{slot.module}.qweight"
    if slot.linear and packed in state_dict:
        return _int4_entry(state_dict, slot, kind)
    if key not in state_dict:
        raise GgufError(f"'{key}' {list(slot.shape)} is missing from the state dict")
    weight = state_dict[key]
    if tuple(weight.shape) != slot.shape:
        raise GgufError(f"'{key}' must be {list(slot.shape)}, got {list(weight.shape)}")
    if slot.heads:
        return {key}, partial(to_gguf_rows, weight, slot.heads)
    return {key}, lambda: weight


def _int4_entry(
    state_dict: Mapping[str, Tensor], slot: Slot, kind: TensorType
) -> tuple[set[str], Callable[[], Tensor]]:
    n, k = slot.shape
    scales = state_dict.get(f"{slot.module}.scales")
    if (
        kind != TensorType.Q4_0
        or scales is None
        or scales.dtype != torch.float16
        or tuple(scales.shape) != (n, k // _GROUP)
        or f"{slot.module}.zeros" in state_dict
    ):
        raise GgufError(
            f"int4 layer '{slot.module}' can be written only as Q4_0, with fp16 scales "
            f"[{n}, {k // _GROUP}] and no zeros"
        )

    def read() -> Tensor:
        codes = ops.int4_unpack(state_dict[f"{slot.module}.qweight"], n, k)
        if not slot.heads:
            return from_int4(codes, scales)
        return from_int4(to_gguf_rows(codes, slot.heads), to_gguf_rows(scales, slot.heads))

    return {f"{slot.module}.qweight", f"{slot.module}.scales"}, read
