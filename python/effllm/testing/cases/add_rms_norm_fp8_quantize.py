"""Problems for add_rms_norm_fp8_quantize: those of rms_norm_fp8_quantize, with a residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.add_rms_norm_fp8_quantize import add_rms_norm_fp8_quantize_ref
from ..case import Args, Kwargs
from .rms_norm_fp8_quantize import BENCH_PROBLEMS, PROBLEMS, RmsNormFp8QuantizeCase


@dataclass(frozen=True)
class AddRmsNormFp8QuantizeCase(RmsNormFp8QuantizeCase):
    """x [m, k] and a residual whose rows lie side by side."""

    op: ClassVar[str] = "add_rms_norm_fp8_quantize"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        (x, *others), options = super().make(device, seed)
        residual = self.rows(device, seed + 2).contiguous()
        return (x, residual, *others), options

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return add_rms_norm_fp8_quantize_ref(*args, **kwargs)

    def baseline(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, *others: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        out = x + residual
        return *super().baseline(out, *others, **kwargs), out

    def prepare_others(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, *others: Any, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        """The sum by torch, then what is timed beside the norm without it."""
        prepare = super().prepare_others
        (name,) = prepare(x + residual, *others, **kwargs)

        def unfused() -> None:
            (norm,) = prepare(x + residual, *others, **kwargs).values()
            norm()

        return {name: unfused}

    def bytes(self) -> int:
        return super().bytes() + 2 * self.m * self.k * self.dtype.itemsize


CASES = [AddRmsNormFp8QuantizeCase(*problem) for problem in PROBLEMS]
BENCH = [AddRmsNormFp8QuantizeCase(*problem) for problem in BENCH_PROBLEMS]
