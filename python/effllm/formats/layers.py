"""One layer of a quantised checkpoint: its tensors read and checked, then the module for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.formats import awq, compressed_tensors, gptq
from effllm.formats.bitstream import num_words
from effllm.formats.checkpoint import Checkpoint, CheckpointError
from effllm.formats.config import QuantConfig, Scheme
from effllm.formats.grouped import GroupedWeight, int4_tensors, kernel_groups
from effllm.nn import Int4Linear
from effllm.nn.packed_linear import frozen

_logger = logging.getLogger(__name__)

# The tensor that only a quantised layer has, by which it is found.
_MARKS = (".qweight", ".weight_packed")
_PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq_v2": ("qweight", "qzeros", "scales", "g_idx"),
    "pack-quantized": (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    ),
}


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

    def tensors(self, checkpoint: Checkpoint) -> list[str]:
        """Names of the tensors that the layer has in the checkpoint, without a bias."""
        names = [f"{self.name}.{part}" for part in _PARTS[self.scheme.format]]
        return [name for name in names if name in checkpoint.tensors]


def find_layers(checkpoint: Checkpoint, config: QuantConfig | None) -> dict[str, StoredLayer]:
    """All quantised layers of a checkpoint, by name.

    Raises:
        CheckpointError: a layer is quantised and the config says otherwise, or a tensor that tells
            its sizes is not a matrix of words.
    """
    layers = {}
    for tensor in checkpoint.tensors:
        mark = next((mark for mark in _MARKS if tensor.endswith(mark)), None)
        if mark is None:
            continue
        name = tensor.removesuffix(mark)
        scheme = None if config is None else config.scheme(name)
        if scheme is None or mark != f".{_PARTS[scheme.format][0]}":
            said = "no quantisation config" if config is None else config.source
            raise CheckpointError(
                f"{checkpoint.tensors[tensor].file}: tensor '{tensor}' is quantised, "
                f"which disagrees with {said}"
                + ("" if scheme is None else f" (format {scheme.format})")
            )
        layers[name] = StoredLayer(name, scheme, *_sizes(checkpoint, name, scheme))
    return layers


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


def read_bias(
    checkpoint: Checkpoint, name: str, module: nn.Linear, device: torch.device | str
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


def _sizes(checkpoint: Checkpoint, name: str, scheme: Scheme) -> tuple[int, int]:
    """(N, K); tensors are compared with them when they are read."""
    main = f"{name}.{_PARTS[scheme.format][0]}"
    info = checkpoint.tensors[main]
    if len(info.shape) != 2 or info.dtype != "I32" or 0 in info.shape:
        raise CheckpointError(
            f"{info.file}: tensor '{main}' must be a non-empty I32 matrix, "
            f"got {info.dtype} {list(info.shape)}"
        )
    rows, columns = info.shape
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


def read_weight(
    checkpoint: Checkpoint, layer: StoredLayer, device: torch.device | str = "cpu"
) -> GroupedWeight:
    """Reads the layer's tensors and decodes them on ``device``.

    Raises:
        CheckpointError: a tensor is missing, has another dtype or shape than the config and the
            layer's sizes ask for, or holds what makes no sense. The message names it.
    """
    name, scheme, n, k = layer.name, layer.scheme, layer.out_features, layer.in_features
    bits = scheme.bits
    group_size = k if scheme.group_size == -1 else scheme.group_size
    num_groups = -(-k // group_size)

    def words(part: str, *shape: int) -> Tensor:
        return checkpoint.read(f"{name}.{part}", shape, ("I32",), device)

    def has(part: str) -> bool:
        return f"{name}.{part}" in checkpoint.tensors

    try:
        if scheme.format == "awq":
            if k % group_size:
                raise ValueError(f"AWQ needs K % group_size == 0, got {k}, {group_size}")
            zeros = None
            if has("qzeros") or not scheme.symmetric:
                zeros = words("qzeros", num_groups, n // 8)
            scales = checkpoint.read_finite(f"{name}.scales", (num_groups, n), device)
            return awq.decode(words("qweight", k, n // 8), zeros, scales, group_size)
        if scheme.format == "pack-quantized":
            return _read_packed(checkpoint, layer, group_size, device)
        qzeros = words("qzeros", num_groups, num_words(n, bits))
        stored = gptq.stored_zeros(qzeros, bits, n)
        declared: gptq.Version = 2 if scheme.format == "gptq_v2" else 1
        version = gptq.stored_version(stored, bits, scheme.symmetric, declared)
        if gptq.is_ambiguous(stored, bits, version):
            _logger.warning(
                "effllm: %s: GPTQ v1 zero points of 0 were stored as -1, which not all writers "
                "and readers treat alike; they are read as GPTQModel does",
                name,
            )
        return gptq.decode(
            words("qweight", num_words(k, bits), n),
            qzeros,
            checkpoint.read_finite(f"{name}.scales", (num_groups, n), device),
            words("g_idx", k) if has("g_idx") else None,
            bits=bits,
            group_size=group_size,
            in_features=k,
            version=version,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: layer '{name}': {error}") from error


def _read_packed(
    checkpoint: Checkpoint, layer: StoredLayer, group_size: int, device: torch.device | str
) -> GroupedWeight:
    name, scheme, n, k = layer.name, layer.scheme, layer.out_features, layer.in_features
    num_groups = -(-k // group_size)
    zero_point = g_idx = None
    zero_name = f"{name}.weight_zero_point"
    info = checkpoint.tensors.get(zero_name)
    # A file that has them means them, whatever the config says.
    if info is not None or not scheme.symmetric:
        packed = (num_words(n, scheme.bits), num_groups)
        unpacked = info is not None and info.dtype == "I8"
        shape = (n, num_groups) if unpacked else packed
        zero_point = checkpoint.read(zero_name, shape, ("I8",) if unpacked else ("I32",), device)
    if f"{name}.weight_g_idx" in checkpoint.tensors:
        g_idx = checkpoint.read(f"{name}.weight_g_idx", (k,), ("I32", "I64"), device)
    scale_name = f"{name}.weight_scale"
    if scheme.per_tensor:
        info = checkpoint.tensors.get(scale_name)
        one = (1, 1) if info is not None and len(info.shape) == 2 else (1,)
        scale = checkpoint.read_finite(scale_name, one, device).view(1, 1).expand(n, 1)
    else:
        scale = checkpoint.read_finite(scale_name, (n, num_groups), device)
    return compressed_tensors.decode(
        checkpoint.read(f"{name}.weight_packed", (n, num_words(k, scheme.bits)), ("I32",), device),
        scale,
        zero_point,
        g_idx,
        bits=scheme.bits,
        group_size=group_size,
        in_features=k,
    )


def make_linear(weight: GroupedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """An ``Int4Linear`` where the codes and groups fit its kernels, else a dense ``nn.Linear``.

    ``dtype`` is that of the dense weight; packed scales keep theirs, and so does the bias.
    """
    n, k = weight.codes.shape
    groups = None if weight.bits > 4 else kernel_groups(weight.groups)
    if groups is None:
        linear = nn.Linear(k, n, bias=bias is not None, device="meta")
        linear.weight = frozen(weight.dequantize().to(dtype))
        if bias is not None:
            linear.bias = frozen(bias)
        return linear
    codes, scales, zeros = int4_tensors(weight, groups)
    module = Int4Linear(k, n, bias=False, group_size=groups.group_size, device="meta")
    module.qweight = frozen(ops.int4_pack(codes))
    module.scales = frozen(scales)
    module.zeros = None if zeros is None else frozen(zeros)
    module.perm = None if groups.perm is None else frozen(groups.perm)
    module.bias = None if bias is None else frozen(bias)
    return module


def kernel_name(bits: int, groups: Tensor, group_size: int) -> str:
    """What ``make_linear`` will run such a weight with, and if it is dense, why.

    Args:
        bits: of a code.
        groups: int64 ``[K]``, the group of each input channel.
        group_size: that of the checkpoint, for the reason.
    """
    if bits > 4:
        return f"dense ({bits}-bit codes)"
    found = kernel_groups(groups)
    if found is None:
        return f"dense (groups of {group_size})"
    return "int4_gemm" if found.perm is None else "int4_gemm, inputs permuted"
