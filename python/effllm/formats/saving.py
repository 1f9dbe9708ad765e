"""effllm.save: a model with packed layers into a checkpoint that other software reads."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from effllm import _load, ops
from effllm.formats import awq, bitsandbytes, compressed_tensors, gptq
from effllm.formats.gguf_model import GGUF_FORMATS, save_gguf
from effllm.formats.grouped import GroupedWeight
from effllm.formats.shards import ShardWriter
from effllm.nn import Fp8Linear, Int4Linear, Int8Linear, Lut4Linear, W8A8Linear
from effllm.nn.quantized_linear import QuantizedLinear
from effllm.nn.scaled_linear import BLOCK, InputsPer, ScaledLinear, ScalesPer

SaveFormat = Literal[
    "compressed-tensors",
    "compressed-tensors-fp8",
    "compressed-tensors-int8",
    "gptq_v2",
    "awq",
    "bitsandbytes",
    "gguf-q4_0",
    "gguf-q4_1",
    "gguf-q8_0",
    "gguf-q4_k",
    "gguf-q6_k",
    "gguf-f16",
    "gguf-bf16",
    "gguf-f32",
]

_Encode = Callable[[Any, torch.dtype], dict[str, Tensor]]


def save(
    model: Any,
    path: str | Path,
    format: SaveFormat = "compressed-tensors",
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 4 * 2**30,
    progress: bool = True,
) -> None:
    """Writes config and weights of a transformers model; quantised layers stay what they are.

    Codes, scales and zero points are written as they are, so that loading the result gives equal
    weights. All is written into a temporary folder (or file) beside ``path``, which is renamed at
    the end: after an error or an interrupt there is no half a checkpoint.

    Args:
        model: from ``effllm.load``, or a transformers model after ``effllm.quantize_``.
        path: the folder to make, which may exist if it is empty; for GGUF the file, ``*.gguf``.
        format: "compressed-tensors" is pack-quantized, read by its package and so by transformers.
            "gptq_v2" also holds permuted inputs (act-order) and short last groups; "awq" is the
            GEMM layout, with one group size for all layers. These three hold ``Int4Linear`` layers;
            "compressed-tensors-fp8" is float-quantized and holds ``Fp8Linear`` layers,
            "compressed-tensors-int8" is int-quantized and holds ``W8A8Linear`` and ``Int8Linear``;
            "bitsandbytes" holds ``Lut4Linear`` layers of NF4, or of FP4, in groups that divide the
            input channels, with the codebook in fp32. "gguf-..." is one file for llama.cpp, with
            all matrices of the type that it names: "gguf-q4_0" and "gguf-q4_1" hold those
            4-bit layers that they can hold exactly (see ``formats.gguf.write_model``), the others
            round them. "gguf-q8_0", "gguf-q4_k" and "gguf-q6_k" hold ``GgufLinear`` layers of any
            of these types; rows that are no multiple of 256 are Q4_1 instead of Q4_K, and Q8_0
            instead of Q6_K. Matrices that are not quantised are rounded as llama.cpp does it,
            those of Q4_K and Q6_K with less error.
        tokenizer: of transformers; put into the folder or, as far as ``tokenizer_metadata`` of
            ``formats.gguf`` can express it, into the file, which llama.cpp does not run without.
        max_shard_bytes: start another file rather than exceed it, except by a single layer. A GGUF
            file is always one.
        progress: show a progress bar.

    Raises:
        ValueError: another format, a model that is not of transformers, no such layer in it
            (but for GGUF), a layer, config or tokenizer that the format cannot hold (the message
            names it), or weights on the meta device.
        FileExistsError: ``path`` exists and is no empty folder.
    """
    if format not in (*_FORMATS, *GGUF_FORMATS):
        known = ", ".join((*_FORMATS, *GGUF_FORMATS))
        raise ValueError(f"effllm.save: format must be one of {known}, got {format}")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"effllm.save: a transformers model is needed, got {type(model).__name__}")
    path = Path(path).absolute()
    if format in GGUF_FORMATS:
        save_gguf(model, path, GGUF_FORMATS[format], tokenizer, progress)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"effllm.save: {path} exists and is no empty folder")
    kind = _FORMATS[format]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kind.layers)}
    _refuse(model, layers, format)
    quantization = kind.config(model, layers)

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        # mkdtemp makes a private folder; a checkpoint gets the rights that mkdir gives.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        _write_configs(model, folder, quantization)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        writer = ShardWriter(folder, max_shard_bytes)
        for tensors in _tensors(model, layers, kind.encode, progress):
            writer.add(tensors)
        writer.finish()
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse(model: nn.Module, layers: dict[str, Any], format: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and name not in layers:
            kind = type(module)
            others = [other for other, row in _FORMATS.items() if issubclass(kind, row.layers)]
            raise ValueError(
                f"effllm.save: layer '{name}': {format} holds no {kind.__name__}, only "
                f"{', '.join(others)} may"
            )
    if not layers:
        raise ValueError(
            f"effllm.save: the model has no {_FORMATS[format].layers[0].__name__}; "
            "use model.save_pretrained"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"effllm.save: '{name}' is on the meta device, it has no values")


def grouped(layer: Int4Linear) -> GroupedWeight:
    """The layer's codes in the order of its input channels, as formats hold them."""
    codes = ops.int4_unpack(layer.qweight, layer.out_features, layer.in_features)
    g_idx = None
    if layer.perm is not None:
        perm = layer.perm.long()
        column = torch.arange(layer.in_features, device=perm.device)
        g_idx = torch.empty_like(perm).index_copy_(0, perm, column // layer.group_size)
        codes = torch.empty_like(codes).index_copy_(1, perm, codes)
    scales = layer.group_scales
    # Products of two levels, where they are numbers of the dtype that the layer's scales have.
    narrow = scales.to(layer.scales.dtype)
    scales = narrow if torch.equal(narrow.float(), scales.float()) else scales
    return GroupedWeight(codes, scales, layer.zeros, 4, layer.group_size, g_idx)


# -- tensors ---------------------------------------------------------------------------------------


def _tensors(
    model: nn.Module, layers: dict[str, Any], encode: _Encode, progress: bool
) -> Iterator[dict[str, Tensor]]:
    """What must be in one file together: a layer, or one other tensor."""
    dtype = _dtype(model)
    for name, layer in tqdm(
        layers.items(), desc="save", unit="layer", leave=False, disable=not progress
    ):
        try:
            parts = encode(layer, dtype)
        except ValueError as error:
            raise ValueError(f"effllm.save: layer '{name}': {error}") from error
        if layer.bias is not None:
            parts["bias"] = layer.bias.detach()
        yield {f"{name}.{part}": tensor for part, tensor in parts.items()}
    inside = tuple(f"{name}." for name in layers)
    # Of parameters that share memory, the first name stands for all.
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in model.state_dict():
        if name in named and not name.startswith(inside):
            yield {name: named[name]}


# -- configs ---------------------------------------------------------------------------------------


def _write_configs(model: Any, folder: Path, quantization: dict[str, Any]) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _dtype(model)
    config.quantization_config = quantization
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _unquantised(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def _kinds(layers: dict[str, Int4Linear]) -> dict[str, tuple[int, bool]]:
    """(group size, symmetric) of each layer; -1 is one group for all input channels.

    A layer of as many input channels as the groups of others have counts as one of those.
    """
    sizes = {m.group_size for m in layers.values() if m.group_size != m.in_features}
    return {
        name: (m.group_size if m.group_size in sizes else -1, m.zeros is None)
        for name, m in layers.items()
    }


def _packed_config(model: nn.Module, layers: dict[str, Int4Linear]) -> dict[str, Any]:
    kinds: dict[tuple[int, bool], list[str]] = {}
    for name, kind in _kinds(layers).items():
        kinds.setdefault(kind, []).append(name)
    groups = {}
    for i, ((group_size, symmetric), names) in enumerate(kinds.items()):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group_size == -1 else "group",
                "group_size": None if group_size == -1 else group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return _compressed_config(model, "pack-quantized", groups)


def _scaled_config(
    model: nn.Module, layers: dict[str, ScaledLinear], format: str, codes: str
) -> dict[str, Any]:
    kinds: dict[tuple[ScalesPer, InputsPer | None, bool, bool], list[str]] = {}
    for name, layer in layers.items():
        static = layer.input_scale is not None
        kind = (layer.scales_per, layer.inputs_per, static, layer.symmetric_inputs)
        kinds.setdefault(kind, []).append(name)
    common = {"num_bits": 8, "type": codes, "symmetric": True}
    groups = {}
    for i, ((scales_per, inputs_per, static, symmetric), names) in enumerate(kinds.items()):
        weights: dict[str, Any] = {"strategy": scales_per, "dynamic": False}
        if scales_per == "block":
            weights["block_structure"] = [BLOCK, BLOCK]
        elif scales_per == "group":
            weights["group_size"] = BLOCK
        inputs = None
        if inputs_per is not None:
            group_size = BLOCK if inputs_per == "group" else None
            inputs = {"strategy": inputs_per, "group_size": group_size, "dynamic": not static}
            inputs["symmetric"] = symmetric
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": common | weights,
            "input_activations": None if inputs is None else common | inputs,
            "output_activations": None,
            "format": format,
        }
    return _compressed_config(model, format, groups)


def _compressed_config(
    model: nn.Module, format: str, groups: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _unquantised(model),
        "kv_cache_scheme": None,
    }


def _gptq_config(model: nn.Module, layers: dict[str, Int4Linear]) -> dict[str, Any]:
    kinds = _kinds(layers)
    common = Counter(kinds.values()).most_common(1)[0][0]
    # GPTQModel quantises all layers of the blocks unless a pattern says otherwise.
    dynamic: dict[str, Any] = {
        f"-:^{re.escape(name)}$": {} for name in _unquantised(model) if name != "lm_head"
    }
    for name, (group_size, symmetric) in kinds.items():
        if (group_size, symmetric) != common:
            permuted = layers[name].perm is not None
            overrides = {"group_size": group_size, "sym": symmetric, "desc_act": permuted}
            dynamic[f"+:^{re.escape(name)}$"] = overrides
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": common[0],
        "sym": common[1],
        "desc_act": any(layer.perm is not None for layer in layers.values()),
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": "lm_head" in layers,
        "dynamic": dynamic,
        "meta": {"quantizer": [f"effllm:{_load.status().version}"]},
    }


def _awq_config(model: nn.Module, layers: dict[str, Int4Linear]) -> dict[str, Any]:
    sizes: dict[int, str] = {}
    for name, (group_size, _) in _kinds(layers).items():
        sizes.setdefault(group_size, name)
    if len(sizes) > 1:
        found = ", ".join(f"{size} ('{name}')" for size, name in sizes.items())
        raise ValueError(f"effllm.save: AWQ needs one group size, the model has {found}")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": next(iter(sizes)),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _unquantised(model),
    }


def _bitsandbytes_config(model: nn.Module, layers: dict[str, Lut4Linear]) -> dict[str, Any]:
    types: dict[str, str] = {}
    for name, layer in layers.items():
        try:
            types.setdefault(bitsandbytes.quant_type(layer.codebook), name)
        except ValueError as error:
            raise ValueError(f"effllm.save: layer '{name}': {error}") from error
    if len(types) > 1:
        found = ", ".join(f"{kind} ('{name}')" for kind, name in types.items())
        raise ValueError(f"effllm.save: bitsandbytes needs one codebook, the model has {found}")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": next(iter(types)),
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(_dtype(model)).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _unquantised(model),
    }


# -- formats ---------------------------------------------------------------------------------------


def _encode_lut4(layer: Lut4Linear, dtype: torch.dtype) -> dict[str, Tensor]:
    codes = ops.int4_unpack(layer.qweight, layer.out_features, layer.in_features)
    return bitsandbytes.encode(codes, layer.codebook, layer.scales, layer.group_size, dtype)


def _encode_scaled(layer: ScaledLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """compressed-tensors has one scale of all as [1], and no short groups.

    Raises:
        ValueError: K is no multiple of the group.
    """
    if layer.scales_per == "group" and layer.in_features % BLOCK:
        raise ValueError(
            f"compressed-tensors needs K % group_size == 0, got K = {layer.in_features}, "
            f"group_size = {BLOCK}"
        )
    scales = layer.scales.detach()
    tensors = {
        "weight": layer.qweight.detach(),
        "weight_scale": scales.view(1) if layer.scales_per == "tensor" else scales,
    }
    if layer.input_scale is not None:
        tensors["input_scale"] = layer.input_scale.detach()
    return tensors


def _of_groups(encode: Callable[[GroupedWeight], dict[str, Tensor]]) -> _Encode:
    return lambda layer, dtype: encode(grouped(layer))


@dataclass(frozen=True)
class _Format:
    """What a format holds, as tensors by their name in the layer, and its config."""

    layers: tuple[type[QuantizedLinear], ...]
    encode: _Encode
    config: Callable[[Any, dict[str, Any]], dict[str, Any]]


_FORMATS = {
    "compressed-tensors": _Format(
        (Int4Linear,), _of_groups(compressed_tensors.encode), _packed_config
    ),
    "compressed-tensors-fp8": _Format(
        (Fp8Linear,),
        _encode_scaled,
        partial(_scaled_config, format="float-quantized", codes="float"),
    ),
    "compressed-tensors-int8": _Format(
        (W8A8Linear, Int8Linear),
        _encode_scaled,
        partial(_scaled_config, format="int-quantized", codes="int"),
    ),
    "gptq_v2": _Format((Int4Linear,), _of_groups(gptq.encode), _gptq_config),
    "awq": _Format((Int4Linear,), _of_groups(awq.encode), _awq_config),
    "bitsandbytes": _Format((Lut4Linear,), _encode_lut4, _bitsandbytes_config),
}
