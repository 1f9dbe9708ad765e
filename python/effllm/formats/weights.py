"""The weights that formats decode to, and the module that runs each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.formats import bitsandbytes
from effllm.formats.config import Scheme
from effllm.formats.grouped import GroupedWeight, int4_tensors, kernel_groups
from effllm.formats.layers import StoredLayer
from effllm.nn import Fp8Linear, Int4Linear, Int8Linear, Lut4Linear, W8A8Linear
from effllm.nn.quantized_linear import frozen
from effllm.nn.scaled_linear import BLOCK, InputsPer, ScaledLinear, ScalesPer


@dataclass(frozen=True)
class LutWeight:
    """``W[n, k] = codebook[codes[n, k]] * scales[n, k // group_size]``.

    Attributes:
        codes: uint8 ``[N, K]`` in 0..15.
        codebook: float ``[16]``.
        scales: float ``[N, ceil(K / group_size)]``.
        group_size: one that the kernels take.
    """

    codes: Tensor
    codebook: Tensor
    scales: Tensor
    group_size: int


@dataclass(frozen=True)
class ScaledWeight:
    """8-bit codes as the kernels take them, and what becomes of the layer's inputs.

    Attributes:
        kind: of the layer.
        codes: float8_e4m3fn or int8 ``[N, K]``, none of them NaN.
        scales: fp32, of the weight; shapes as in ``ScaledLinear``.
        inputs_per, symmetric_inputs: as there.
        input_scale: fp32 ``[1]`` or None.
    """

    kind: type[ScaledLinear]
    codes: Tensor
    scales: Tensor
    inputs_per: InputsPer | None
    input_scale: Tensor | None
    symmetric_inputs: bool = True


@dataclass(frozen=True)
class DenseWeight:
    """Decoded already, because no kernel takes the codes: float ``values`` ``[N, K]``."""

    values: Tensor


Weight = GroupedWeight | LutWeight | ScaledWeight | DenseWeight


def make_linear(weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A layer of ours where its kernels take the weight, else ``nn.Linear``.

    ``dtype`` is that of the dense weight; scales keep theirs, and so does the bias.
    """
    if isinstance(weight, ScaledWeight):
        return _scaled_linear(weight, bias)
    if isinstance(weight, LutWeight):
        return _lut4_linear(weight, bias)
    if isinstance(weight, DenseWeight):
        return _dense_linear(weight.values, bias, dtype)
    groups = None if weight.bits > 4 else kernel_groups(weight.groups)
    if groups is None:
        return _dense_linear(weight.dequantize(), bias, dtype)
    n, k = weight.codes.shape
    codes, scales, zeros = int4_tensors(weight, groups)
    module = Int4Linear(k, n, bias=False, group_size=groups.group_size, device="meta")
    module.qweight = frozen(ops.int4_pack(codes))
    module.scales = frozen(scales)
    module.zeros = None if zeros is None else frozen(zeros)
    module.perm = None if groups.perm is None else frozen(groups.perm)
    module.bias = None if bias is None else frozen(bias)
    return module


def _scaled_linear(weight: ScaledWeight, bias: Tensor | None) -> ScaledLinear:
    n, k = weight.codes.shape
    static = weight.input_scale is not None
    options: dict[str, Any] = {"inputs_per": weight.inputs_per, "static": static}
    module = weight.kind(k, n, bias=False, device="meta", **options)
    if isinstance(module, W8A8Linear) and not weight.symmetric_inputs:
        module.weight_sums = frozen(weight.codes.sum(1, dtype=torch.int32))
    module.qweight = frozen(weight.codes)
    module.scales = frozen(weight.scales)
    module.input_scale = None if weight.input_scale is None else frozen(weight.input_scale)
    module.bias = None if bias is None else frozen(bias)
    return module


def _lut4_linear(weight: LutWeight, bias: Tensor | None) -> Lut4Linear:
    n, k = weight.codes.shape
    module = Lut4Linear(k, n, bias=False, group_size=weight.group_size, device="meta")
    module.qweight = frozen(ops.int4_pack(weight.codes))
    module.codebook = frozen(weight.codebook)
    module.scales = frozen(weight.scales)
    module.bias = None if bias is None else frozen(bias)
    return module


def _dense_linear(values: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    n, k = values.shape
    linear = nn.Linear(k, n, bias=bias is not None, device="meta")
    linear.weight = frozen(values.to(dtype))
    if bias is not None:
        linear.bias = frozen(bias)
    return linear


def scaled_kind(scheme: Scheme) -> type[ScaledLinear] | None:
    """The layer that has a stored one's codes and scales as they are; None if none has."""
    kind: type[ScaledLinear] = Int8Linear if scheme.inputs is None else W8A8Linear
    if scheme.floats:
        kind = Fp8Linear
    elif scheme.format not in ("int-quantized", "naive-quantized") or not (
        scheme.bits == 8 and scheme.symmetric
    ):
        return None
    return kind if scales_per(scheme) in kind.weights_per else None


def scales_per(scheme: Scheme) -> ScalesPer | None:
    """What of a stored weight has a scale each; None if it is nothing that a kernel knows."""
    kinds: dict[tuple[int, int], ScalesPer] = {
        (-1, -1): "tensor",
        (1, -1): "channel",
        (1, BLOCK): "group",
        (BLOCK, BLOCK): "block",
    }
    return kinds.get((scheme.rows, scheme.group_size))


def kernel_name(layer: StoredLayer, groups: Tensor | None) -> str:
    """What ``make_linear`` will run a stored layer with, and if it is dense, why.

    Args:
        layer: as the headers describe it.
        groups: int64 ``[K]``, the group of each input channel, of a ``GroupedWeight``; else None.
    """
    bits, k = layer.scheme.bits, layer.in_features
    if layer.scheme.format in ("nf4", "fp4"):
        fits = bitsandbytes.kernel_group_size(k, layer.group_size) is not None
        return "lut4_gemm" if fits else f"dense (blocks of {layer.group_size} across rows)"
    if groups is None and bits > 8:
        return f"dense ({layer.scheme.format})"
    kind = scaled_kind(layer.scheme)
    if kind is not None:
        name = "fp8" if kind is Fp8Linear else "int8"
        return f"{name}_weight_gemm" if layer.scheme.inputs is None else f"{name}_gemm"
    if groups is None:
        return f"dense ({'e4m3' if layer.scheme.floats else f'{bits}-bit'} codes)"
    if bits > 4:
        return f"dense ({bits}-bit codes)"
    found = kernel_groups(groups)
    if found is None:
        return f"dense (groups of {layer.group_size})"
    return "int4_gemm" if found.perm is None else "int4_gemm, inputs permuted"
