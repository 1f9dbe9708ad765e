"""Problems for dense_gemm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.dense_gemm import dense_gemm_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class DenseGemmCase(Case):
    """x [m, k] times a weight [n, k]."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    op: ClassVar[str] = "dense_gemm"
    baseline_name: ClassVar[str] = "torch.mm"

    @property
    def id(self) -> str:
        bias = "-bias" if self.bias else ""
        return f"m{self.m}-n{self.n}-k{self.k}-{str(self.dtype)[6:]}{bias}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=self.dtype, seed=seed)
        weight = normal(self.n, self.k, dtype=self.dtype, seed=seed + 1)
        bias = normal(self.n, dtype=self.dtype, seed=seed + 2).to(device) if self.bias else None
        return (x.to(device), weight.to(device), bias), {}

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return dense_gemm_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.prepare_baseline(*args, **kwargs)()

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A linear layer of PyTorch (cuBLAS on a GPU)."""
        x, weight, bias = args
        return lambda: torch.nn.functional.linear(x, weight, bias)

    def bytes(self) -> int:
        values = self.n * self.k + self.m * (self.k + self.n)
        return values * self.dtype.itemsize

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k, "M": self.m}


_HALF, _BF16 = torch.float16, torch.bfloat16
CASES = [
    # Either tile, whole and with tails in M, N and K; more tiles than run at once; short and long
    # K; an odd number of CTAs of rows, so that the last cluster has one too many.
    *(
        DenseGemmCase(m, n, k, dtype, bias)
        for m, n, k, bias in (
            (1, 8, 8, True),
            (128, 256, 64, False),
            (256, 256, 512, False),
            (130, 264, 200, True),
            (300, 520, 1032, True),
            (77, 3000, 4104, False),
            (1100, 2056, 136, True),
            (2600, 4232, 264, False),
        )
        for dtype in (_HALF, _BF16)
    ),
    # Nothing to do.
    *(DenseGemmCase(m, n, 64, bias=True) for m, n in ((0, 64), (4, 0))),
    DenseGemmCase(65537, 8, 64),
]
CPU_CASES = [
    DenseGemmCase(m, n, k, dtype, bias)
    for m, n, k, bias in ((3, 17, 33, True), (1, 1, 7, False), (5, 70, 300, True), (4, 64, 0, True))
    for dtype in (_HALF, _BF16, torch.float32)
]
BENCH = [
    DenseGemmCase(m, n, k)
    for m, n, k in (
        (8192, 8192, 8192),
        (4096, 4096, 4096),
        (4096, 28672, 4096),
        (2048, 8192, 8192),
        (1024, 8192, 8192),
    )
]
