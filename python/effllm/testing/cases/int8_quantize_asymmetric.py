"""Problems for int8_quantize_asymmetric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int8_quantize_asymmetric import int8_quantize_asymmetric_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class Int8QuantizeAsymmetricCase(Case):
    """Rows [m, k] that reach from ``-below`` times as far as they do above 0."""

    m: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    below: float = 0.2
    op: ClassVar[str] = "int8_quantize_asymmetric"

    @property
    def id(self) -> str:
        return f"m{self.m}-k{self.k}-{str(self.dtype)[6:]}-below{self.below:g}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=torch.float32, device=device, seed=seed)
        return (torch.where(x < 0, x * self.below, x).to(self.dtype),), {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return int8_quantize_asymmetric_ref(*args, **kwargs)

    baseline = reference

    def bytes(self) -> int:
        return self.m * (self.k * (self.dtype.itemsize + 1) + 5)

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {"M": self.m, "K": self.k}


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [
    # Vectors and single elements, rows that are not multiples of 4.
    *(
        Int8QuantizeAsymmetricCase(m, k, dtype)
        for m, k in ((1, 128), (5, 576), (17, 1368), (3, 200), (8, 77), (2, 1), (130, 2112))
        for dtype in DTYPES
    ),
    # On one side of 0, on both alike, and more below.
    *(Int8QuantizeAsymmetricCase(5, 320, below=below) for below in (0.0, 1.0, 3.0, 1e6)),
    # As many octets per thread as there are kernels for, and rows that are too long for any.
    *(
        Int8QuantizeAsymmetricCase(2, k, dtype)
        for k in (16384, 28672, 57344)
        for dtype in (torch.bfloat16, torch.float32)
    ),
    # Nothing to do, in each dimension; a row of no elements has a scale and a zero all the same.
    *(Int8QuantizeAsymmetricCase(m, k) for m, k in ((0, 64), (4, 0))),
    # More rows than two dimensions of a grid may have.
    Int8QuantizeAsymmetricCase(65537, 8),
]
BENCH = [Int8QuantizeAsymmetricCase(m, k) for k in (4096, 8192) for m in (1, 16, 256, 4096, 32768)]
