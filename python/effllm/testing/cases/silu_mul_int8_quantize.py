"""Problems for silu_mul_int8_quantize: those of silu_mul_fp8_quantize without groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...ops.int8_quantize import int8_quantize, int8_quantize_ref
from ...ops.silu_mul_int8_quantize import silu_mul_int8_quantize_ref
from ..case import Args, Kwargs
from . import silu_mul_fp8_quantize as fp8


@dataclass(frozen=True)
class SiluMulInt8QuantizeCase(fp8.SiluMulFp8QuantizeCase):
    """gate and up [m, k], halves of one tensor, with a scale per row or a known one of
    ``scale_dtype``."""

    op: ClassVar[str] = "silu_mul_int8_quantize"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        return super().make(device, seed)[0], {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return silu_mul_int8_quantize_ref(*args)

    def baseline(
        self, gate: Tensor, up: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return int8_quantize_ref(silu(gate) * up, scale)

    def prepare_others(
        self, gate: Tensor, up: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        """torch for the product, the op of this library that then quantises it."""
        return {"torch + int8_quantize": lambda: int8_quantize(silu(gate) * up, scale)}

    def shape(self) -> dict[str, int | str]:
        scale = "row" if self.scale_dtype is None else "static"
        return {"M": self.m, "K": self.k, "scale": scale}


CASES = [SiluMulInt8QuantizeCase(*astuple(case)) for case in fp8.CASES if case.group_size is None]
BENCH = [SiluMulInt8QuantizeCase(*astuple(case)) for case in fp8.BENCH if case.group_size is None]
