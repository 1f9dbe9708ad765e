"""Problems for int8_quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int8_quantize import int8_quantize_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class Int8QuantizeCase(Case):
    """Rows [m, k], with a scale each or a known one of ``scale_dtype``."""

    m: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype | None = None
    op: ClassVar[str] = "int8_quantize"

    @property
    def id(self) -> str:
        known = "" if self.scale_dtype is None else f"-static-{str(self.scale_dtype)[6:]}"
        return f"m{self.m}-k{self.k}-{str(self.dtype)[6:]}{known}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=self.dtype, device=device, seed=seed)
        if self.scale_dtype is None:
            return (x,), {}
        # Small enough that outliers saturate.
        return (x, torch.tensor([0.0246], dtype=self.scale_dtype, device=device)), {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return int8_quantize_ref(*args, **kwargs)

    baseline = reference

    def bytes(self) -> int:
        scales = self.m if self.scale_dtype is None else 1
        return self.m * self.k * (self.dtype.itemsize + 1) + 4 * scales

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {"M": self.m, "K": self.k, "scale": "row" if self.scale_dtype is None else "static"}


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [
    # Vectors and single elements, rows that are not multiples of 4.
    *(
        Int8QuantizeCase(m, k, dtype, scale_dtype)
        for scale_dtype in (None, torch.float32)
        for m, k in ((1, 128), (5, 576), (17, 1368), (3, 200), (8, 77), (2, 1), (130, 2112))
        for dtype in DTYPES
    ),
    *(Int8QuantizeCase(3, 200, scale_dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    # As many octets per thread as there are kernels for, and rows that are too long for any.
    *(
        Int8QuantizeCase(2, k, dtype, scale_dtype)
        for k in (16384, 28672, 57344)
        for scale_dtype in (None, torch.float32)
        for dtype in (torch.bfloat16, torch.float32)
    ),
    # Nothing to do, in each dimension; a row of no elements has a scale all the same.
    *(
        Int8QuantizeCase(m, k, scale_dtype=scale_dtype)
        for m, k in ((0, 64), (4, 0))
        for scale_dtype in (None, torch.float32)
    ),
    # More rows than two dimensions of a grid may have.
    Int8QuantizeCase(65537, 8),
]
BENCH = [
    Int8QuantizeCase(m, k, scale_dtype=scale_dtype)
    for scale_dtype in (None, torch.float32)
    for k in (4096, 8192)
    for m in (1, 16, 256, 4096, 32768)
]
