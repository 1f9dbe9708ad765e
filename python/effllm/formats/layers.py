"""The quantised layers of a checkpoint: found by what only they have, sizes checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from effllm.formats import bitsandbytes
from effllm.formats.bitstream import num_words
from effllm.formats.checkpoint import FLOATS, Checkpoint, CheckpointError, TensorInfo
from effllm.formats.config import QuantConfig, Scheme

_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_SPARSE = ("compressed", "bitmask", "shape", "row_offsets")
_PLAIN = ("weight", *_SPARSE, "weight_scale", "weight_zero_point", "input_scale")
_BNB = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "weight.quant_state.bitsandbytes__"


def _blockwise(quant_type: str) -> tuple[str, ...]:
    return (_STATE + quant_type, "weight", *(f"weight.{part}" for part in _BNB))


# Names of a layer's tensors, the one by which it is found first.
_PARTS = {
    "awq": _GPTQ[:3],
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "pack-quantized": (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    ),
    "float-quantized": _PLAIN,
    "int-quantized": _PLAIN,
    "naive-quantized": _PLAIN,
    "sparse-24-bitmask": _SPARSE,
    "sparse-bitmask": _SPARSE,
    # AutoFP8 writes the names that compressed-tensors has, with values of one scale per tensor.
    "fp8": ("weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale"),
    "nf4": _blockwise("nf4"),
    "fp4": _blockwise("fp4"),
    "llm_int8": ("weight", "SCB", "weight_format"),
}

GROUPED = ("awq", "gptq", "gptq_v2", "pack-quantized")
"""The formats that decode to a ``GroupedWeight``."""

# What tells that a tensor is of a quantised layer.
_MARK = re.compile(rf"(.*)\.(qweight|weight_packed|compressed|{re.escape(_STATE)}\w+)", re.DOTALL)
_CODE_DTYPES = ("F8_E4M3", "F8_E5M2", "I8", "U8")

_MAX_STATE_BYTES = 10_000


@dataclass(frozen=True)
class StoredLayer:
    """A quantised layer as the headers and the config describe it.

    Attributes:
        name: of the module.
        scheme: from the config.
        out_features: N.
        in_features: K.
    """

    name: str
    scheme: Scheme
    out_features: int
    in_features: int

    @property
    def group_size(self) -> int:
        """Input channels per scale: that of the scheme, K for -1."""
        return self.in_features if self.scheme.group_size == -1 else self.scheme.group_size

    def tensors(self, checkpoint: Checkpoint) -> list[str]:
        """Names of the tensors that the layer has in the checkpoint, without a bias."""
        names = [f"{self.name}.{part}" for part in _PARTS[self.scheme.format]]
        return [name for name in names if name in checkpoint.tensors]


def find_layers(checkpoint: Checkpoint, config: QuantConfig | None) -> dict[str, StoredLayer]:
    """All quantised layers of a checkpoint, by name.

    Raises:
        CheckpointError: a layer is quantised and the config says otherwise, or a tensor that tells
            its sizes is not a matrix of what it must hold.
    """
    states = {name.partition(f".{_STATE}")[0] for name in checkpoint.tensors if _STATE in name}
    layers = {}
    for tensor, info in checkpoint.tensors.items():
        name, mark = _layer_of(tensor, info)
        if mark is None or (mark == "weight" and name in states):
            continue
        scheme = None if config is None else _scheme(config, name, mark)
        if scheme is None or name in layers:
            raise CheckpointError(
                f"{info.file}: tensor '{tensor}' is quantised, which disagrees with "
                + _said(config, name)
            )
        layers[name] = _stored_layer(checkpoint, name, scheme)
    return layers


def unused_scales(checkpoint: Checkpoint, config: QuantConfig | None) -> list[str]:
    """FP8 scales of weights that are not quantised, which mean nothing.

    The quantiser of transformers leaves a weight as it is if blocks do not fit into it, and saves
    beside it a scale that nobody has set.
    """
    found: list[str] = []
    if config is None:
        return found
    for tensor in checkpoint.tensors:
        name = tensor.removesuffix(".weight_scale_inv")
        weight = checkpoint.tensors.get(f"{name}.weight")
        if name == tensor or weight is None or weight.dtype not in FLOATS:
            continue
        scheme = config.scheme(name)
        if scheme is not None and scheme.format == "fp8":
            found.append(tensor)
    return found


def _layer_of(tensor: str, info: TensorInfo) -> tuple[str, str | None]:
    """The layer that a tensor marks, and the mark; None for any other tensor."""
    if tensor.endswith(".weight"):
        return tensor.removesuffix(".weight"), "weight" if info.dtype in _CODE_DTYPES else None
    match = _MARK.fullmatch(tensor)
    return (tensor, None) if match is None else (match[1], match[2])


def _scheme(config: QuantConfig, name: str, mark: str) -> Scheme | None:
    """What the config says of a layer that is stored so; None if it says something else."""
    scheme = config.scheme(name)
    if mark == _SPARSE[0] and config.sparsity is not None:
        if scheme is None:
            return Scheme(config.sparsity, 16, -1, symmetric=True)
        return scheme if _PARTS[scheme.format] is _PLAIN else None
    return scheme if scheme is not None and mark == _PARTS[scheme.format][0] else None


def _said(config: QuantConfig | None, name: str) -> str:
    if config is None:
        return "no quantisation config"
    scheme = config.scheme(name)
    return f"{config.source}" + ("" if scheme is None else f" (format {scheme.format})")


def _stored_layer(checkpoint: Checkpoint, name: str, scheme: Scheme) -> StoredLayer:
    if scheme.format in ("nf4", "fp4"):
        state = read_quant_state(checkpoint, name, scheme.format)
        return StoredLayer(name, replace(scheme, group_size=state.blocksize), *state.shape)
    if f"{name}.{_SPARSE[0]}" in checkpoint.tensors:
        return StoredLayer(name, scheme, *_sparse_sizes(checkpoint, name))
    return StoredLayer(name, scheme, *_sizes(checkpoint, name, scheme))


def read_quant_state(checkpoint: Checkpoint, name: str, quant_type: str) -> bitsandbytes.QuantState:
    """The sizes of a 4-bit layer of bitsandbytes. Raises CheckpointError."""
    tensor = f"{name}.{_STATE}{quant_type}"
    info = checkpoint.tensors[tensor]
    if len(info.shape) != 1 or info.shape[0] > _MAX_STATE_BYTES:
        raise CheckpointError(
            f"{info.file}: tensor '{tensor}' must be at most {_MAX_STATE_BYTES} bytes of text, "
            f"got {info.dtype} {list(info.shape)}"
        )
    text = bytes(checkpoint.read(tensor, info.shape, ("U8",)).tolist())
    try:
        return bitsandbytes.parse_state(text, quant_type)
    except ValueError as error:
        raise CheckpointError(f"{info.file}: tensor '{tensor}': {error}") from error


def checked_linear(
    model: nn.Module, layer: StoredLayer, checkpoint: Checkpoint, name: str | None = None
) -> nn.Linear:
    """The model's linear layer that a stored one is for, under ``name`` if not under its own.

    Raises:
        CheckpointError: the model has no such layer, no linear one, or one of other sizes.
    """
    try:
        module = model.get_submodule(layer.name if name is None else name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        found = "no such layer" if module is None else type(module).__name__
        raise CheckpointError(
            f"{checkpoint.folder}: '{layer.name}' is stored as a quantised linear layer, "
            f"and the model has {found}"
        )
    needed = [module.out_features, module.in_features]
    found_sizes = [layer.out_features, layer.in_features]
    if needed != found_sizes:
        main = layer.tensors(checkpoint)[0]
        info = checkpoint.tensors[main]
        raise CheckpointError(
            f"{info.file}: tensor '{main}' must be a weight [N, K] = {needed}, "
            f"got one of {found_sizes} ({list(info.shape)})"
        )
    return module


def _sparse_sizes(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """(N, K) of a weight of which only the values that are kept are stored."""
    info = checkpoint.tensors.get(f"{name}.shape")
    column = info is not None and info.shape == (2, 1)
    shape = checkpoint.read(f"{name}.shape", (2, 1) if column else (2,), ("I64", "I32"))
    n, k = shape.flatten().tolist()
    if n < 1 or k < 1:
        file = checkpoint.tensors[f"{name}.shape"].file
        raise CheckpointError(f"{file}: tensor '{name}.shape' must be positive, got [{n}, {k}]")
    return n, k


def _sizes(checkpoint: Checkpoint, name: str, scheme: Scheme) -> tuple[int, int]:
    """(N, K); tensors are compared with them when they are read."""
    main = f"{name}.{_PARTS[scheme.format][0]}"
    info = checkpoint.tensors[main]
    bytes_ = main.endswith(".weight")
    dtype = "I32" if not bytes_ else "F8_E4M3" if scheme.floats else "I8"
    if len(info.shape) != 2 or info.dtype != dtype or 0 in info.shape:
        raise CheckpointError(
            f"{info.file}: tensor '{main}' must be a non-empty {dtype} matrix, "
            f"got {info.dtype} {list(info.shape)}"
        )
    rows, columns = info.shape
    if bytes_:
        return rows, columns
    if scheme.format == "awq":
        return 8 * columns, rows
    if scheme.format == "pack-quantized":
        n, k = checkpoint.read(f"{name}.weight_shape", (2,), ("I64", "I32")).tolist()
        if n != rows or k < 1 or columns != num_words(k, scheme.bits):
            raise CheckpointError(
                f"{info.file}: tensor '{main}' must have the shape that '{name}.weight_shape' = "
                f"[{n}, {k}] and {scheme.bits} bits give, got {list(info.shape)}"
            )
        return n, k
    # Where no g_idx tells K, the words are full.
    g_idx = checkpoint.tensors.get(f"{name}.g_idx")
    if g_idx is not None and len(g_idx.shape) == 1:
        return columns, g_idx.shape[0]
    return columns, rows * 32 // scheme.bits
