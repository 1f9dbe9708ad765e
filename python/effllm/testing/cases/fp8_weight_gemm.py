"""Problems for fp8_weight_gemm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.fp8_gemm import dequantize_weight
from ...ops.fp8_weight_gemm import fp8_weight_gemm_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal
from .fp8_gemm import random_codes, random_scales
from .int4_gemm import MODEL_SHAPES


@dataclass(frozen=True)
class Fp8WeightGemmCase(Case):
    """x [m, k] times a weight [n, k] of every code with scales per "tensor", "row" or "block"."""

    m: int
    n: int
    k: int
    per: str = "row"
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    scales_dtype: torch.dtype = torch.float32
    op: ClassVar[str] = "fp8_weight_gemm"
    baseline_name: ClassVar[str] = "torch.mm"

    @property
    def id(self) -> str:
        bias = "-bias" if self.bias else ""
        types = f"{str(self.dtype)[6:]}-s{str(self.scales_dtype)[6:]}"
        return f"m{self.m}-n{self.n}-k{self.k}-{self.per}-{types}{bias}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=self.dtype, seed=seed)
        weight = random_codes(self.n, self.k, seed + 1, device)
        w_scales = random_scales(self.n, self.k, self.per, self.scales_dtype, seed + 2)
        bias = normal(self.n, dtype=self.dtype, seed=seed + 3) if self.bias else None
        tensors = (x, weight, w_scales, bias)
        return tuple(None if tensor is None else tensor.to(device) for tensor in tensors), {}

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return fp8_weight_gemm_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.prepare_baseline(*args, **kwargs)()

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A dense layer over the dequantised weight in the dtype of x (cuBLAS on a GPU)."""
        x, weight, w_scales, bias = args
        dense = dequantize_weight(weight, w_scales, x.dtype)
        return lambda: torch.nn.functional.linear(x, dense, bias)

    def bytes(self) -> int:
        groups = -(-self.k // 128)
        scales = {"tensor": 1, "row": self.n, "block": -(-self.n // 128) * groups}[self.per]
        return self.n * self.k + 4 * scales + self.m * (self.k + self.n) * self.dtype.itemsize

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k, "M": self.m, "scales": self.per}


_HALF, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = [
    # Every tile configuration and both sides of its limits.
    *(Fp8WeightGemmCase(m, 128, 256) for m in (1, 7, 8, 9, 32, 33, 64, 65, 200)),
    *(
        Fp8WeightGemmCase(m, 192, 512, per, dtype, m == 5)
        for m in (5, 37)
        for per in ("tensor", "row", "block")
        for dtype in (_HALF, _BF16)
    ),
    *(Fp8WeightGemmCase(3, 300, 300, "block", scales_dtype=dtype) for dtype in (_HALF, _BF16)),
    # Tails, as for fp8_gemm.
    *(
        Fp8WeightGemmCase(m, n, k, per, dtype, bias=True)
        for m, n, k in ((3, 576, 448), (9, 200, 2112), (33, 65, 1368), (2, 33, 333), (6, 72, 1))
        for per, dtype in (("row", _HALF), ("block", _BF16))
    ),
    *(
        Fp8WeightGemmCase(m, n, k, per)
        for m, n, k in ((1, 64, 8192), (12, 136, 4104), (130, 320, 1032))
        for per in ("row", "block")
    ),
    # Hopper's kernel for many tokens, which takes rows that are multiples of 16 bytes: each of its
    # tiles, tails in each dimension, short last groups.
    *(
        Fp8WeightGemmCase(m, n, k, per, dtype, bias=dtype is _HALF)
        for m, n, k in (
            (17, 136, 1288),
            (48, 72, 8),
            (100, 648, 136),
            (129, 264, 2056),
            (300, 1032, 392),
        )
        for per in ("row", "block")
        for dtype in (_HALF, _BF16)
    ),
    *(Fp8WeightGemmCase(600, 2056, 520, per) for per in ("tensor", "row", "block")),
    # Nothing to do, in each dimension.
    *(
        Fp8WeightGemmCase(m, n, k, per, bias=True)
        for m, n, k in ((0, 64, 64), (4, 0, 64), (4, 64, 0))
        for per in ("row", "block")
    ),
    Fp8WeightGemmCase(65537, 8, 64),
    # The kernel for few tokens: every number of them; a K that is cut into many parts, the last
    # group short; rows for several turns of all clusters.
    *(
        Fp8WeightGemmCase(m, 152, 1168, ("row", "block")[m % 2], (_HALF, _BF16)[m // 2 % 2])
        for m in range(1, 17)
    ),
    *(Fp8WeightGemmCase(m, 72, 14352, per) for m in (1, 8, 16) for per in ("row", "block")),
    Fp8WeightGemmCase(5, 60008, 272, "block", bias=True),
    Fp8WeightGemmCase(16, 40008, 272, "row", _HALF),
]
CPU_CASES = [
    *(
        Fp8WeightGemmCase(m, 97, k, per, _FP32, per == "row")
        for m, k in ((2, 352), (3, 129), (4, 320), (40, 200))
        for per in ("tensor", "row", "block")
    ),
    # AMX: one to three panels of tokens, and more than a call takes; rows that end in either half
    # of a unit, and blocks of them; columns that end in a line, a step, a group and a unit.
    *(
        Fp8WeightGemmCase(m, n, k, per, _BF16, per == "row", scales_dtype)
        for m, n, k in (
            (1, 97, 352),
            (3, 33, 129),
            (16, 48, 257),
            (17, 130, 383),
            (47, 300, 520),
            (90, 1100, 639),
            (257, 97, 769),
            (300, 161, 64),
        )
        for per in ("tensor", "row", "block")
        for scales_dtype in (_HALF, _FP32)
    ),
]
BENCH = [
    Fp8WeightGemmCase(m, n, k, per)
    for per in ("row", "block")
    for n, k in MODEL_SHAPES
    for m in (1, 16, 64, 128, 1024, 4096)
]
