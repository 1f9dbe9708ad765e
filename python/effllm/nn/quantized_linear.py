"""What quantised linear layers share: sizes, and how their state is kept whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def frozen(data: Tensor) -> nn.Parameter:
    """A parameter that is never trained."""
    return nn.Parameter(data, requires_grad=False)


class QuantizedLinear(nn.Module, ABC):
    """Stands in for ``nn.Linear`` (N = out_features, K = in_features).

    Holds ``bias``; a subclass adds the codes, ``qweight``, and what makes weights of them, and
    names all of its quantised tensors. Moving or casting the module never changes those: a dtype
    cast (``.half()``, ``.to(torch.bfloat16)``) touches only the bias.
    """

    # The layout's version, kept by state_dict in its metadata.
    _version = 1

    quantised: ClassVar[tuple[str, ...]]
    """Names of the quantised parameters, those that may be None included."""

    qweight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
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
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", frozen(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Keyword arguments that make a layer of this kind, for those of its tensors that are not
        None; plain data."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight ``[N, K]`` that the codes stand for, computed anew each time."""

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
