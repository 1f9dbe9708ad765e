"""One stored layer's tensors, read, checked and decoded."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from effllm.formats import awq, bitsandbytes, compressed_tensors, gptq, scaled, sparse
from effllm.formats.bitstream import num_words
from effllm.formats.checkpoint import FLOATS, Checkpoint, CheckpointError
from effllm.formats.grouped import GroupedWeight
from effllm.formats.layers import StoredLayer, read_quant_state
from effllm.formats.weights import DenseWeight, LutWeight, ScaledWeight, Weight, scaled_kind
from effllm.nn.scaled_linear import ScaledLinear

_logger = logging.getLogger(__name__)

Device = torch.device | str


def read_weight(checkpoint: Checkpoint, layer: StoredLayer, device: Device = "cpu") -> Weight:
    """Reads the layer's tensors and decodes them on ``device``.

    Raises:
        CheckpointError: a tensor is missing, has another dtype or shape than the config and the
            layer's sizes ask for, or holds what makes no sense. The message names it.
    """
    try:
        return _READERS[layer.scheme.format](_Parts(checkpoint, layer, device))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: layer '{layer.name}': {error}") from error


def read_bias(
    checkpoint: Checkpoint, name: str, module: nn.Linear, device: Device
) -> Tensor | None:
    """The bias of layer ``name``, float ``[N]`` as stored; None if it has none.

    AutoGPTQ gave every layer a bias, of zeros where the model has none: that is no bias.

    Raises:
        CheckpointError: the model has a bias and the checkpoint none, or one of another shape or
            dtype.
    """
    bias_name = f"{name}.bias"
    if module.bias is None and bias_name not in checkpoint.tensors:
        return None
    bias = checkpoint.read_finite(bias_name, (module.out_features,), device)
    return None if module.bias is None and not bool(bias.any()) else bias


class _Parts:
    """The tensors of one layer, by the names that they have in it."""

    def __init__(self, checkpoint: Checkpoint, layer: StoredLayer, device: Device) -> None:
        self.checkpoint, self.layer, self.device = checkpoint, layer, device
        self.scheme = layer.scheme
        self.n, self.k = layer.out_features, layer.in_features
        self.num_groups = -(-self.k // layer.group_size)

    def has(self, part: str) -> bool:
        return self._name(part) in self.checkpoint.tensors

    def shape(self, part: str) -> tuple[int, ...] | None:
        """None for a part that is missing, which ``read`` then says."""
        info = self.checkpoint.tensors.get(self._name(part))
        return None if info is None else info.shape

    def dtype(self, part: str) -> str | None:
        """As safetensors spells it; None for a part that is missing."""
        info = self.checkpoint.tensors.get(self._name(part))
        return None if info is None else info.dtype

    def read(self, part: str, *shape: int, dtypes: tuple[str, ...] = ("I32",)) -> Tensor:
        return self.checkpoint.read(self._name(part), shape, dtypes, self.device)

    def finite(self, part: str, *shape: int) -> Tensor:
        return self.checkpoint.read_finite(self._name(part), shape, self.device)

    def one(self, part: str) -> Tensor:
        """A single finite value, stored with up to two dimensions, as float ``[1, 1]``."""
        shape = self.shape(part)
        ones = (1,) if shape is None or len(shape) > 2 else (1,) * len(shape)
        return self.finite(part, *ones).view(1, 1)

    def _name(self, part: str) -> str:
        return f"{self.layer.name}.{part}"


# -- integers in words -----------------------------------------------------------------------------


def _read_awq(parts: _Parts) -> GroupedWeight:
    n, k, group_size = parts.n, parts.k, parts.layer.group_size
    if k % group_size:
        raise ValueError(f"AWQ needs K % group_size == 0, got {k}, {group_size}")
    zeros = None
    if parts.has("qzeros") or not parts.scheme.symmetric:
        zeros = parts.read("qzeros", parts.num_groups, n // 8)
    scales = parts.finite("scales", parts.num_groups, n)
    return awq.decode(parts.read("qweight", k, n // 8), zeros, scales, group_size)


def _read_gptq(parts: _Parts) -> GroupedWeight:
    n, k, bits = parts.n, parts.k, parts.scheme.bits
    qzeros = parts.read("qzeros", parts.num_groups, num_words(n, bits))
    stored = gptq.stored_zeros(qzeros, bits, n)
    declared: gptq.Version = 2 if parts.scheme.format == "gptq_v2" else 1
    version = gptq.stored_version(stored, bits, parts.scheme.symmetric, declared)
    if gptq.is_ambiguous(stored, bits, version):
        _logger.warning(
            "effllm: %s: GPTQ v1 zero points of 0 were stored as -1, which not all writers "
            "and readers treat alike; they are read as GPTQModel does",
            parts.layer.name,
        )
    return gptq.decode(
        parts.read("qweight", num_words(k, bits), n),
        qzeros,
        parts.finite("scales", parts.num_groups, n),
        parts.read("g_idx", k) if parts.has("g_idx") else None,
        bits=bits,
        group_size=parts.layer.group_size,
        in_features=k,
        version=version,
    )


def _read_packed(parts: _Parts) -> GroupedWeight:
    n, k, scheme = parts.n, parts.k, parts.scheme
    zero_point = g_idx = None
    # A file that has them means them, whatever the config says.
    if parts.has("weight_zero_point") or not scheme.symmetric:
        if parts.dtype("weight_zero_point") == "I8":
            zero_point = parts.read("weight_zero_point", n, parts.num_groups, dtypes=("I8",))
        else:
            words = num_words(n, scheme.bits)
            zero_point = parts.read("weight_zero_point", words, parts.num_groups)
    if parts.has("weight_g_idx"):
        g_idx = parts.read("weight_g_idx", k, dtypes=("I32", "I64"))
    if scheme.rows == -1:
        scale = parts.one("weight_scale").expand(n, 1)
    else:
        scale = parts.finite("weight_scale", n, parts.num_groups)
    return compressed_tensors.decode(
        parts.read("weight_packed", n, num_words(k, scheme.bits)),
        scale,
        zero_point,
        g_idx,
        bits=scheme.bits,
        group_size=parts.layer.group_size,
        in_features=k,
    )


# -- bytes -----------------------------------------------------------------------------------------


def _read_plain(parts: _Parts) -> ScaledWeight | DenseWeight:
    """compressed-tensors float-, int- and naive-quantized."""
    dtype = "F8_E4M3" if parts.scheme.floats else "I8"
    if parts.has("compressed"):
        codes = _read_kept(parts, (dtype,))
    else:
        codes = parts.read("weight", parts.n, parts.k, dtypes=(dtype,))
    scale = _read_scale(parts, "weight_scale")
    zero_point = None
    if parts.has("weight_zero_point") or not parts.scheme.symmetric:
        shape = parts.shape("weight_scale") or ()
        zero_point = parts.read("weight_zero_point", *shape, dtypes=("I8",)).view(scale.shape)
    return _scaled(parts, codes, scale, zero_point)


def _read_sparse(parts: _Parts) -> DenseWeight:
    """Not quantised, only sparse."""
    return _finite(_read_kept(parts, FLOATS))


def _read_kept(parts: _Parts, dtypes: tuple[str, ...]) -> Tensor:
    """``[N, K]`` of one of these dtypes, zeros put back between the values that are stored."""
    bitmask = parts.read("bitmask", parts.n, -(-parts.k // 8), dtypes=("U8",))
    shape = parts.shape("compressed") or ()
    return sparse.decode(parts.read("compressed", *shape, dtypes=dtypes), bitmask, parts.k)


def _read_fp8(parts: _Parts) -> ScaledWeight | DenseWeight:
    name = "weight_scale_inv"
    if not parts.has(name) and parts.has("weight_scale"):
        name = "weight_scale"
    codes = parts.read("weight", parts.n, parts.k, dtypes=("F8_E4M3",))
    if parts.dtype(name) not in ("F8_E8M0", "U8"):
        return _scaled(parts, codes, _read_scale(parts, name), None)
    stored = parts.read(name, *_scale_shape(parts), dtypes=("F8_E8M0", "U8"))
    return _scaled(parts, codes, scaled.exponents(stored), None)


def _scale_shape(parts: _Parts) -> tuple[int, int]:
    rows = parts.n if parts.scheme.rows == -1 else parts.scheme.rows
    return -(-parts.n // rows), parts.num_groups


def _read_scale(parts: _Parts, name: str) -> Tensor:
    shape = _scale_shape(parts)
    return parts.one(name) if parts.scheme.rows == -1 else parts.finite(name, *shape)


def _scaled(
    parts: _Parts, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> ScaledWeight | DenseWeight:
    kind = scaled_kind(parts.scheme)
    if kind is not None:
        if zero_point is not None and bool(zero_point.any()):
            codes_are = "e4m3" if parts.scheme.floats else "symmetric int8"
            raise ValueError(f"weight_zero_point of {codes_are} weights must be 0")
        whole = parts.scheme.rows == -1 and parts.scheme.group_size == -1
        return _scaled_weight(parts, kind, codes, scale.view(1) if whole else scale)
    rows = parts.n if parts.scheme.rows == -1 else parts.scheme.rows
    return _finite(scaled.decode(codes, scale, zero_point, rows, parts.layer.group_size))


def _scaled_weight(
    parts: _Parts, kind: type[ScaledLinear], codes: Tensor, scales: Tensor
) -> ScaledWeight:
    scales = scales.float()
    # Of e4m3 codes NaN is the largest; the largest number times a scale must be one.
    numbers = codes.dtype == torch.int8 or (codes.view(torch.uint8) & 0x7F).max() < 0x7F
    if not bool(numbers and (scales * 448).isfinite().all()):
        raise ValueError("weights must be finite, got NaN or infinity")
    input_scale = None
    if parts.scheme.static:
        name = "activation_scale" if parts.has("activation_scale") else "input_scale"
        input_scale = parts.one(name).view(1).float()
        if not bool(input_scale > 0):
            raise ValueError(f"{name} must be positive, got {input_scale.item():g}")
    scheme = parts.scheme
    return ScaledWeight(kind, codes, scales, scheme.inputs, input_scale, scheme.symmetric_inputs)


def _finite(values: Tensor) -> DenseWeight:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("weights must be finite, got NaN or infinity")
    return DenseWeight(values)


# -- bitsandbytes ----------------------------------------------------------------------------------


def _read_blockwise(parts: _Parts) -> LutWeight | DenseWeight:
    state = read_quant_state(parts.checkpoint, parts.layer.name, parts.scheme.format)
    count = parts.n * parts.k
    codes = bitsandbytes.unpack(_read_bytes(parts, -(-count // 2)), count)
    quant_map = parts.finite("weight.quant_map", 16)
    absmax = _read_absmax(parts, state)
    group_size = bitsandbytes.kernel_group_size(parts.k, state.blocksize)
    if group_size is None:
        return DenseWeight(bitsandbytes.dequantize(codes, quant_map, absmax, state))
    scales = bitsandbytes.group_scales(absmax, state, group_size)
    return LutWeight(codes.view(state.shape), quant_map, scales, group_size)


def _read_bytes(parts: _Parts, count: int) -> Tensor:
    """The packed codes: a column of numbers of any type, of which only the bytes count."""
    sizes = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
    size = sizes.get(parts.dtype("weight") or "U8")
    if size is None or count % size:
        raise ValueError(f"weight must be {count} bytes of codes, got {parts.dtype('weight')}")
    packed = parts.read("weight", count // size, 1, dtypes=tuple(sizes))
    return packed.flatten().view(torch.uint8)


def _read_absmax(parts: _Parts, state: bitsandbytes.QuantState) -> Tensor:
    blocks = state.num_blocks
    if state.nested_blocksize is None:
        return parts.finite("weight.absmax", blocks)
    return bitsandbytes.unnest(
        parts.read("weight.absmax", blocks, dtypes=("U8",)),
        parts.finite("weight.nested_quant_map", 256),
        parts.finite("weight.nested_absmax", -(-blocks // state.nested_blocksize)),
        state,
    )


def _read_int8(parts: _Parts) -> DenseWeight:
    if parts.has("weight_format"):
        layout = parts.read("weight_format", dtypes=("U8",))
        if int(layout):
            raise ValueError(f"weight_format must be 0 (rows), got {int(layout)}")
    codes = parts.read("weight", parts.n, parts.k, dtypes=("I8",))
    return DenseWeight(bitsandbytes.decode_int8(codes, parts.finite("SCB", parts.n)))


_READERS: dict[str, Callable[[_Parts], Weight]] = {
    "awq": _read_awq,
    "gptq": _read_gptq,
    "gptq_v2": _read_gptq,
    "pack-quantized": _read_packed,
    "float-quantized": _read_plain,
    "int-quantized": _read_plain,
    "naive-quantized": _read_plain,
    "sparse-24-bitmask": _read_sparse,
    "sparse-bitmask": _read_sparse,
    "fp8": _read_fp8,
    "nf4": _read_blockwise,
    "fp4": _read_blockwise,
    "llm_int8": _read_int8,
}
