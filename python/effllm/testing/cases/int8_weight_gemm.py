"""Problems for int8_weight_gemm: those of fp8_weight_gemm, with groups instead of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int8_weight_gemm import dequantize_groups, int8_weight_gemm_ref
from ..case import Args, Kwargs
from ..hostile import normal
from . import fp8_weight_gemm as fp8
from .int8_gemm import random_int8


def group_scales(n: int, k: int, per: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Scales per "tensor", "row" or "group", over some powers of two."""
    shape = {"tensor": (1,), "row": (n, 1), "group": (n, -(-k // 128))}[per]
    powers = 2.0 ** torch.linspace(-9, -6, max(1, shape[0])).view(-1, *[1] * (len(shape) - 1))
    return ((normal(*shape, seed=seed).abs() + 0.5) * powers).to(dtype)


@dataclass(frozen=True)
class Int8WeightGemmCase(fp8.Fp8WeightGemmCase):
    """x [m, k] times a weight [n, k] of every code with scales per "tensor", "row" or "group"."""

    op: ClassVar[str] = "int8_weight_gemm"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=self.dtype, seed=seed)
        weight = random_int8(self.n, self.k, seed + 1, device)
        w_scales = group_scales(self.n, self.k, self.per, self.scales_dtype, seed + 2)
        bias = normal(self.n, dtype=self.dtype, seed=seed + 3) if self.bias else None
        tensors = (x, weight, w_scales, bias)
        return tuple(None if tensor is None else tensor.to(device) for tensor in tensors), {}

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return int8_weight_gemm_ref(*args, **kwargs)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A dense layer over the dequantised weight in the dtype of x (cuBLAS on a GPU)."""
        x, weight, w_scales, bias = args
        dense = dequantize_groups(weight, w_scales, x.dtype)
        return lambda: torch.nn.functional.linear(x, dense, bias)

    def bytes(self) -> int:
        scales = {"tensor": 1, "row": self.n, "group": self.n * -(-self.k // 128)}[self.per]
        return self.n * self.k + 4 * scales + self.m * (self.k + self.n) * self.dtype.itemsize


def _sisters(cases: list[fp8.Fp8WeightGemmCase]) -> list[Int8WeightGemmCase]:
    def sister(m: int, n: int, k: int, per: str, *others: Any) -> Int8WeightGemmCase:
        return Int8WeightGemmCase(m, n, k, "group" if per == "block" else per, *others)

    return [sister(*astuple(case)) for case in cases]


CASES = _sisters(fp8.CASES)
CPU_CASES = _sisters(fp8.CPU_CASES)
BENCH = _sisters(fp8.BENCH)
