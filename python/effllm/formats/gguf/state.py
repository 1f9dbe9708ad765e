"""The weights of a model, tensor by tensor, out of a GGUF file and into one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effllm import ops
from effllm.formats.gguf.architecture import Slot, slots, to_gguf_rows, to_hf_rows
from effllm.formats.gguf.blocks import (
    DECODED,
    dequantize,
    from_blocks,
    from_int4,
    names,
    quantize,
    to_blocks,
    to_int4,
)
from effllm.formats.gguf.config import config_metadata, head_dim_of, more_ends, read_config
from effllm.formats.gguf.layout import BLOCK_TYPES
from effllm.formats.gguf.reader import GgufFile
from effllm.formats.gguf.rope import ROPE_FREQS, rope_freqs
from effllm.formats.gguf.spec import GgufError, TensorType, quote
from effllm.formats.gguf.writer import TensorSource, write_gguf
from effllm.nn import GgufLinear, Int4Linear
from effllm.nn.gguf_linear import packed_blocks
from effllm.nn.quantized_linear import QuantizedLinear
from effllm.ops.int4_gemm import dequantize as int4_dequantize
from effllm.quantization.gguf_blocks import fitting_type

_GROUP = 32
# Of 64 rows each, as int4_pack has them, that are converted at once.
_STRIPS = 4

# general.file_type, which llama.cpp shows and otherwise ignores.
_FILE_TYPES = {
    TensorType.F32: 0,
    TensorType.F16: 1,
    TensorType.Q4_0: 2,
    TensorType.Q4_1: 3,
    TensorType.Q8_0: 7,
    TensorType.Q4_K: 14,
    TensorType.Q6_K: 18,
    TensorType.BF16: 32,
}
_QUANTIZATION_VERSION = 2

_STORED = {TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}


def read_state_dict(
    file: GgufFile, *, int4: bool = True, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The entries of the Hugging Face state dict, one tensor in memory at a time.

    Each tensor of the file is released when it has been read (see ``GgufFile.release``).

    Args:
        file: its ``read_config`` is the model's config.
        int4: linear layers that ``int4_layers`` names come as the parameters of an ``Int4Linear``
            with groups of 32: ``<layer>.qweight`` int32, ``.scales`` fp16 and, where the zero point
            is not 8, ``.zeros`` uint8; those of ``layout.BLOCK_TYPES`` as those of a
            ``GgufLinear``. Without, or for other layers, ``<layer>.weight``.
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
        parameters = _packed(raw, info.type, slot) if int4 else None
        if parameters is not None:
            del raw
            file.release(slot.gguf)
            for name, tensor in parameters.items():
                yield f"{slot.module}.{name}", tensor
            continue
        to = dtype or _STORED.get(info.type, torch.float32)
        if slot.offset:
            # In fp32, where taking away what was added is exact.
            weight = (dequantize(raw, info.type, slot.shape) - slot.offset).to(to)
        else:
            weight = dequantize(raw, info.type, slot.shape, to)
        del raw
        file.release(slot.gguf)
        yield f"{slot.module}.{slot.parameter}", weight


def _packed(raw: Tensor, kind: TensorType, slot: Slot) -> dict[str, Tensor] | None:
    """Parameters of the layer over a slot's codes, ``qweight`` first; None where it is dense."""
    if not slot.linear:
        return None
    n, k = slot.shape
    if kind in BLOCK_TYPES:
        return packed_blocks(*to_blocks(raw, kind, (n, k)), BLOCK_TYPES[kind])
    converted = to_int4(raw, kind, (n, k))
    if converted is None:
        return None
    codes, scales, zeros = converted
    parameters = {"qweight": ops.int4_pack(codes), "scales": scales}
    return parameters if zeros is None else parameters | {"zeros": zeros}


def int4_layers(file: GgufFile) -> dict[str, bool]:
    """The linear layers that become ``Int4Linear``, and whether they have no zeros.

    Those stored as Q4_0, and those stored as Q4_1 if every block allows it (see
    ``blocks.to_int4``), for which the tensor is read. Raises as ``read_state_dict`` does.
    """
    found = {}
    for slot in _checked_slots(file):
        kind = file.tensors[slot.gguf].type
        if slot.linear and kind == TensorType.Q4_0:
            found[slot.module] = True
        elif slot.linear and kind == TensorType.Q4_1:
            if to_int4(file.raw(slot.gguf), kind, slot.shape) is not None:
                found[slot.module] = False
            file.release(slot.gguf)
    return found


def write_model(
    path: str | os.PathLike[str],
    model: Any,
    tensor_type: TensorType,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> None:
    """Writes a transformers model as GGUF, whole or not at all.

    Args:
        path: replaced if it exists.
        model: of a type that ``config_metadata`` takes. Up to three end tokens of its generation
            config are kept. Layers replaced by ``Int4Linear`` are stored as Q4_0 without loss, if
            they have groups that 32 divides, scales that are fp16 numbers, and no zero points but
            8; as Q4_1 with any zero points whose products with the scales are fp16 numbers; as any
            other type, their values are rounded to it. Those by ``GgufLinear`` keep their blocks,
            of whatever type they are, in files of Q8_0, Q4_K and Q6_K.
        tensor_type: of all other matrices: F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K or Q6_K; where
            rows are no multiple of 256, Q4_1 for Q4_K and Q8_0 for Q6_K. Vectors are F32.
        metadata: more of it, such as ``tokenizer_metadata``; it wins over what follows from the
            config.
        progress: show a progress bar.

    Raises:
        GgufError: a weight is missing, unexpected, without values or of the wrong shape, or cannot
            be stored as the type; the config cannot be expressed.
    """
    if tensor_type not in _FILE_TYPES:
        raise GgufError(f"{tensor_type.name} cannot be written, only {names(tuple(_FILE_TYPES))}")
    config = model.config.to_dict()
    all_metadata = config_metadata(config)
    all_metadata["general.file_type"] = _FILE_TYPES[tensor_type]
    if tensor_type.block_values > 1:
        all_metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    config["head_dim"] = head_dim_of(config)
    # A head of codes has a tensor of its own, whatever the config says.
    config["tie_word_embeddings"] &= not isinstance(model.get_output_embeddings(), QuantizedLinear)
    sources = []
    freqs = rope_freqs(config["rope_parameters"], config["head_dim"])
    if freqs is not None:
        sources.append(TensorSource.of(ROPE_FREQS, freqs, TensorType.F32))
    wanted = list(slots(config))
    _refuse_unexpected(model, wanted, config["tie_word_embeddings"])
    for slot in wanted:
        kind = _stored_type(model, slot, tensor_type)
        sources.append(TensorSource(slot.gguf, slot.shape, kind, _reader(model, slot, kind)))
    all_metadata |= metadata or {}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    all_metadata |= more_ends(all_metadata.get("tokenizer.ggml.eos_token_id"), ends)
    write_gguf(path, all_metadata, sources, progress)


def _stored_type(model: Any, slot: Slot, tensor_type: TensorType) -> TensorType:
    """Of a slot, in a file of ``tensor_type``."""
    if len(slot.shape) != 2:
        return TensorType.F32
    if tensor_type not in BLOCK_TYPES:
        return tensor_type
    module = _submodule(model, slot.module)
    if slot.linear and isinstance(module, GgufLinear):
        return TensorType[module.tensor_type.upper()]
    return TensorType[fitting_type(BLOCK_TYPES[tensor_type], slot.shape[-1]).upper()]


def _submodule(model: Any, name: str) -> Any:
    """None where the model has none of the name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _checked_slots(file: GgufFile) -> list[Slot]:
    """The slots of the file's config, after checking that its tensors are just those."""
    config = read_config(file)
    wanted = {slot.gguf: slot for slot in slots(config)}
    for name in file.tensors.keys() - wanted.keys() - {ROPE_FREQS}:
        raise GgufError(
            f"{file.path}: tensor {quote(name)} is no part of a {config['model_type']} model"
        )
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


def _refuse_unexpected(model: Any, wanted: list[Slot], tied: bool) -> None:
    """A weight that nothing stores is a model that computes something else."""
    known = {f"{slot.module}.{slot.parameter}" for slot in wanted}
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    known |= {"lm_head.weight"} if tied else set()
    modules = {slot.module for slot in wanted}
    for key in model.state_dict():
        owner, _, parameter = key.rpartition(".")
        inside = owner in packed & modules and parameter != "bias"
        if key not in known and not inside:
            raise GgufError(
                f"{quote(key)} is no weight that a {model.config.model_type} model of this config "
                "has in GGUF"
            )


def _reader(model: Any, slot: Slot, kind: TensorType) -> Callable[[], Tensor]:
    """A function that gives a slot's values, or blocks, in the order of the file."""
    key = f"{slot.module}.{slot.parameter}"
    module = _submodule(model, slot.module)
    if slot.linear and isinstance(module, QuantizedLinear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
        tensor: Tensor | None = module.qweight
    else:
        tensor = getattr(module, slot.parameter, None)
        shape = () if tensor is None else tuple(tensor.shape)
    if tensor is None:
        raise GgufError(f"'{key}' {list(slot.shape)} is missing from the model")
    if shape != slot.shape:
        raise GgufError(f"'{key}' must be {list(slot.shape)}, got {list(shape)}")
    if tensor.is_meta:
        raise GgufError(f"'{key}' is on the meta device, it has no values")
    if slot.linear and isinstance(module, QuantizedLinear):
        return _packed_reader(module, slot, kind)
    return partial(_gguf_values, tensor, slot)


def _gguf_values(values: Tensor, slot: Slot) -> Tensor:
    if slot.offset:
        return values.float() + slot.offset
    return to_gguf_rows(values, slot.heads) if slot.heads else values


def _packed_reader(module: QuantizedLinear, slot: Slot, kind: TensorType) -> Callable[[], Tensor]:
    if kind in (TensorType.Q4_0, TensorType.Q4_1):
        return _int4_reader(module, slot, kind)
    if isinstance(module, GgufLinear) and kind in BLOCK_TYPES:
        return lambda: _blocks(module, slot, kind)
    if isinstance(module, Int4Linear):
        return lambda: _rounded_int4(module, slot, kind)
    return lambda: _gguf_values(module.weight, slot)


def _int4_reader(module: QuantizedLinear, slot: Slot, kind: TensorType) -> Callable[[], Tensor]:
    """The codes as they are, in blocks of Q4_0 or Q4_1: a group of 64 is two blocks."""
    problem = None
    if not isinstance(module, Int4Linear):
        problem = f"it is a {type(module).__name__}"
    elif module.perm is not None:
        problem = "its inputs are permuted"
    elif kind == TensorType.Q4_0 and module.zeros is not None and bool((module.zeros != 8).any()):
        problem = "it has zero points other than 8"
    elif module.group_size % _GROUP:
        problem = f"its groups are of {module.group_size}, no multiple of {_GROUP}"
    elif not torch.equal(module.group_scales.half().float(), module.group_scales.float()):
        problem = "its scales are no fp16 numbers"
    elif kind == TensorType.Q4_1 and not _fits_q4_1(module, slot):
        problem = "its zero points times its scales are no fp16 numbers"
    if problem is not None or not isinstance(module, Int4Linear):
        raise GgufError(
            f"layer '{slot.module}' cannot be stored as {kind.name} without loss, because "
            f"{problem}; Q8_0 and the float types round it"
        )
    return partial(_int4_blocks, module, slot, kind)


def _blocks(module: GgufLinear, slot: Slot, kind: TensorType) -> Tensor:
    raw = from_blocks(module.codes, module.headers, kind).view(module.out_features, -1)
    return (to_gguf_rows(raw, slot.heads) if slot.heads else raw).flatten()


def _fits_q4_1(module: Int4Linear, slot: Slot) -> bool:
    try:
        _int4_blocks(module, slot, TensorType.Q4_1)
    except GgufError:
        return False
    return True


def _int4_blocks(module: Int4Linear, slot: Slot, kind: TensorType) -> Tensor:
    codes = ops.int4_unpack(module.qweight, module.out_features, module.in_features)
    scales = module.group_scales
    zeros: Tensor = torch.full_like(scales, 8, dtype=torch.uint8)
    if module.zeros is not None:
        zeros = module.zeros
    repeats, blocks = module.group_size // _GROUP, module.in_features // _GROUP

    def spread(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(repeats, 1)[:, :blocks].contiguous()

    parts = [codes, spread(scales.half()), spread(zeros)]
    if slot.heads:
        parts = [to_gguf_rows(part, slot.heads) for part in parts]
    return from_int4(*(parts if kind == TensorType.Q4_1 else parts[:2]))


def _rounded_int4(module: Int4Linear, slot: Slot, kind: TensorType) -> Tensor:
    """Blocks of ``kind``, by way of fp32 values of some rows at a time."""
    blocks = []
    for first in range(0, module.qweight.shape[0], _STRIPS):
        strips = slice(first, first + _STRIPS)
        rows = slice(64 * first, 64 * (first + _STRIPS))
        zeros = None if module.zeros is None else module.zeros[rows]
        values = int4_dequantize(
            module.qweight[strips],
            module.group_scales[rows],
            zeros,
            module.in_features,
            module.group_size,
        )
        if module.perm is not None:
            values = torch.empty_like(values).index_copy_(1, module.perm.long(), values)
        blocks.append(quantize(values, kind).view(len(values), -1))
    raw = torch.cat(blocks)
    return (to_gguf_rows(raw, slot.heads) if slot.heads else raw).flatten()
