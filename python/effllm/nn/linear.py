"""Int4Linear: a linear layer with packed 4-bit weights, one scale per group of input channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.ops.int4_gemm import dequantize

# Sizes of the packed layout: one row of `qweight` per strip of 64 output channels, 512 words per
# 64 input channels of a strip.
_TILE = 64
_WORDS_PER_TILE = 512

GROUP_SIZES = (32, 64, 128)


def resolve_group_size(group_size: int, in_features: int) -> int:
    """The group size that ``int4_gemm`` gets: -1 stands for one group over all input channels.

    Only 32, 64, 128 and K itself are allowed, so that the shape of the scales always tells the
    grouping and a state dict needs no entry for it.
    """
    resolved = in_features if group_size == -1 else group_size
    if resolved not in (*GROUP_SIZES, in_features):
        raise ValueError(
            f"group_size must be 32, 64, 128 or -1 (= in_features, {in_features}), got {group_size}"
        )
    return resolved


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Int4Linear(nn.Module):
    """``y = x @ W.T + bias`` with ``W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]``.

    Stands in for ``nn.Linear`` (N = out_features, K = in_features, g = group_size). All tensors are
    plain parameters without gradient; gradients flow to ``x`` (LoRA), never to the weight.

    Parameters:
        qweight: int32 ``[ceil(N/64), ceil(K/64) * 512]``, the codes packed by ``int4_pack``.
        scales: float ``[N, ceil(K/g)]``; the last group may be short.
        zeros: uint8 ``[N, ceil(K/g)]``, or None: every zero point is 8 (symmetric).
        bias: float ``[N]`` or None.

    Moving or casting the module never changes ``qweight``, ``scales`` or ``zeros``: a dtype cast
    (``.half()``, ``.to(torch.bfloat16)``) touches only the bias.
    """

    # The packed layout's version, kept by state_dict in its metadata.
    _version = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 64,
        symmetric: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero layer, to be filled by ``load_state_dict``; see ``from_linear`` as well.

        ``dtype`` is that of scales and bias. Raises ValueError on sizes < 1 or a wrong group size.
        """
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"in_features and out_features must be positive, got {in_features}, {out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = resolve_group_size(group_size, in_features)

        def frozen(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            data = torch.zeros(shape, device=device, dtype=dtype)
            return nn.Parameter(data, requires_grad=False)

        words = _ceil_div(in_features, _TILE) * _WORDS_PER_TILE
        groups = _ceil_div(in_features, self.group_size)
        self.qweight = frozen(_ceil_div(out_features, _TILE), words, dtype=torch.int32)
        self.scales = frozen(out_features, groups, dtype=dtype)
        self.zeros: nn.Parameter | None
        self.bias: nn.Parameter | None
        zeros = None if symmetric else frozen(out_features, groups, dtype=torch.uint8)
        self.register_parameter("zeros", zeros)
        self.register_parameter("bias", frozen(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 64, symmetric: bool = True
    ) -> Int4Linear:
        """Quantises ``linear`` by rounding to nearest, on the device of its weight.

        The scales take the weight's dtype; the bias keeps its own tensor.
        Raises ValueError for a wrong group size, a meta, non-float or non-finite weight.
        """
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.round_to_nearest import round_to_nearest

        weight = linear.weight.detach()
        group_size = resolve_group_size(group_size, linear.in_features)
        codes, scales, zeros = round_to_nearest(weight, group_size, symmetric)
        module = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            group_size=group_size,
            symmetric=symmetric,
            device="meta",
        )
        module.qweight = nn.Parameter(ops.int4_pack(codes), requires_grad=False)
        module.scales = nn.Parameter(scales, requires_grad=False)
        if zeros is not None:
            module.zeros = nn.Parameter(zeros, requires_grad=False)
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return module.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight ``[N, K]`` in the dtype of the scales, computed anew each time."""
        weight = dequantize(
            self.qweight, self.scales, self.zeros, self.in_features, self.group_size
        )
        return weight.to(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16 or bf16 (fp32 too on the CPU) -> ``[..., N]`` of x's dtype."""
        return ops.int4_gemm(
            x, self.qweight, self.scales, self.zeros, self.bias, group_size=self.group_size
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}, "
            f"symmetric={self.zeros is None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        """Lets ``fn`` move everything, but keeps the dtype of the quantised tensors."""
        quantised = [p for p in (self.qweight, self.scales, self.zeros) if p is not None]

        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype != tensor.dtype and any(tensor is p for p in quantised):
                return tensor.to(applied.device)
            return applied

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Adds errors that ``strict=False`` must not hide: half a quantised weight is garbage."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        layer = prefix.rstrip(".") or type(self).__name__
        version = local_metadata.get("version")
        if version is not None and version > self._version:
            error_msgs.append(
                f"{layer}: packed layout version {version} is newer than this effllm's "
                f"{self._version}"
            )
        wanted = {"qweight", "scales"} | (set() if self.zeros is None else {"zeros"})
        found = {
            key for key in ("qweight", "scales", "zeros", "weight") if prefix + key in state_dict
        }
        if found and found != wanted:
            error_msgs.append(
                f"{layer}: an Int4Linear with {'no ' if self.zeros is None else ''}zero points "
                f"loads {sorted(wanted)} together, the state dict has {sorted(found)}"
            )
