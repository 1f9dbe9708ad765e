"""Problems for rms_norm_int8_quantize: those of rms_norm_fp8_quantize without groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int8_quantize import int8_quantize, int8_quantize_ref
from ...ops.rms_norm_int8_quantize import rms_norm_int8_quantize_ref
from ..case import Args, Kwargs
from .rms_norm_fp8_quantize import (
    BENCH_PROBLEMS,
    PROBLEMS,
    RmsNormFp8QuantizeCase,
    hugging_face_norm,
)


@dataclass(frozen=True)
class RmsNormInt8QuantizeCase(RmsNormFp8QuantizeCase):
    """x [m, k] with a scale per row, or a known one of ``scale_dtype``."""

    op: ClassVar[str] = "rms_norm_int8_quantize"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        args, options = super().make(device, seed)
        return args, {"eps": options["eps"]}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return rms_norm_int8_quantize_ref(*args, **kwargs)

    def baseline(
        self, x: Tensor, weight: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        return int8_quantize_ref(hugging_face_norm(x, weight, kwargs["eps"]), scale)

    def prepare_others(
        self, x: Tensor, weight: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        """torch's own fused norm, and the op of this library that then quantises it."""

        def unfused() -> None:
            int8_quantize(torch.nn.functional.rms_norm(x, (self.k,), weight, kwargs["eps"]), scale)

        return {"torch.rms_norm + int8_quantize": unfused}

    def shape(self) -> dict[str, int | str]:
        scale = "row" if self.scale_dtype is None else "static"
        return {"M": self.m, "K": self.k, "scale": scale}


UNGROUPED = [problem for problem in PROBLEMS if problem[2] is None]
UNGROUPED_BENCH = [problem for problem in BENCH_PROBLEMS if problem[2] is None]
CASES = [RmsNormInt8QuantizeCase(*problem) for problem in UNGROUPED]
BENCH = [RmsNormInt8QuantizeCase(*problem) for problem in UNGROUPED_BENCH]
