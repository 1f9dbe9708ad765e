"""Problems for add_rms_norm_int8_quantize: those of rms_norm_int8_quantize, with a residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.add_rms_norm_int8_quantize import add_rms_norm_int8_quantize_ref
from ..case import Args, Kwargs
from .rms_norm_int8_quantize import UNGROUPED, UNGROUPED_BENCH, RmsNormInt8QuantizeCase


@dataclass(frozen=True)
class AddRmsNormInt8QuantizeCase(RmsNormInt8QuantizeCase):
    """x [m, k] and a residual whose rows lie side by side."""

    op: ClassVar[str] = "add_rms_norm_int8_quantize"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        (x, *others), options = super().make(device, seed)
        residual = self.rows(device, seed + 2).contiguous()
        return (x, residual, *others), options

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return add_rms_norm_int8_quantize_ref(*args, **kwargs)

    def baseline(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, *others: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        out = x + residual
        return *super().baseline(out, *others, **kwargs), out

    def prepare_others(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, *others: Any, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        """The sum by torch, then what is timed beside rms_norm_int8_quantize."""

        def unfused() -> None:
            (norm,) = RmsNormInt8QuantizeCase.prepare_others(
                self, x + residual, *others, **kwargs
            ).values()
            norm()

        return {"torch.rms_norm + int8_quantize": unfused}

    def bytes(self) -> int:
        return super().bytes() + 2 * self.m * self.k * self.dtype.itemsize


CASES = [AddRmsNormInt8QuantizeCase(*problem) for problem in UNGROUPED]
BENCH = [AddRmsNormInt8QuantizeCase(*problem) for problem in UNGROUPED_BENCH]
