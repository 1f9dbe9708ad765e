"""What linear layers over packed 4-bit codes share: sizes, and how their state is kept whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

# Sizes of the packed layout: one row of `qweight` per strip of 64 output channels, 512 words per
# 64 input channels of a strip.
_TILE = 64
_WORDS_PER_TILE = 512

GROUP_SIZES = (32, 64, 128)


def resolve_group_size(group_size: int, in_features: int) -> int:
    """The group size that the ops get: -1 stands for one group over all input channels.

    Only 32, 64, 128 and K itself are allowed, so that the shape of the scales always tells the
    grouping and a state dict needs no entry for it.
    """
    resolved = in_features if group_size == -1 else group_size
    if resolved not in (*GROUP_SIZES, in_features):
        raise ValueError(
            f"group_size must be 32, 64, 128 or -1 (= in_features, {in_features}), got {group_size}"
        )
    return resolved


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def frozen(data: Tensor) -> nn.Parameter:
    """A parameter that is never trained."""
    return nn.Parameter(data, requires_grad=False)


class PackedLinear(nn.Module, ABC):
    """Stands in for ``nn.Linear`` (N = out_features, K = in_features, g = group_size).

    Holds ``qweight`` and ``bias``; a subclass adds what makes weights of the codes, and names all
    of its quantised tensors. Moving or casting the module never changes those: a dtype cast
    (``.half()``, ``.to(torch.bfloat16)``) touches only the bias.
    """

    # The packed layout's version, kept by state_dict in its metadata.
    _version = 1

    quantised: ClassVar[tuple[str, ...]]
    """Names of the quantised parameters, those that may be None included."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"in_features and out_features must be positive, got {in_features}, {out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = resolve_group_size(group_size, in_features)
        self.num_groups = ceil_div(in_features, self.group_size)
        words = ceil_div(in_features, _TILE) * _WORDS_PER_TILE
        self.qweight = frozen(
            torch.zeros(ceil_div(out_features, _TILE), words, device=device, dtype=torch.int32)
        )
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", frozen(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @abstractmethod
    def _kind(self) -> str:
        """What this layer is, for messages about its state dict: "an Int4Linear with ..."."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Lets ``fn`` move everything, but keeps the dtype of the quantised tensors."""
        quantised = [p for name in self.quantised if (p := getattr(self, name)) is not None]

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
        wanted = {name for name in self.quantised if getattr(self, name) is not None}
        found = {key for key in (*self.quantised, "weight") if prefix + key in state_dict}
        if found and found != wanted:
            error_msgs.append(
                f"{layer}: {self._kind()} loads {sorted(wanted)} together, the state dict has "
                f"{sorted(found)}"
            )
