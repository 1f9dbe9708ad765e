"""Problems for fp8_quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.fp8_quantize import fp8_quantize_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class Fp8QuantizeCase(Case):
    """Rows [m, k] in groups of ``group_size``, None: one scale per row."""

    m: int
    k: int
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    op: ClassVar[str] = "fp8_quantize"

    @property
    def id(self) -> str:
        return f"m{self.m}-k{self.k}-g{self.group_size}-{str(self.dtype)[6:]}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=self.dtype, device=device, seed=seed)
        return (x,), {"group_size": self.group_size}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return fp8_quantize_ref(*args, **kwargs)

    baseline = reference

    def bytes(self) -> int:
        groups = 1 if self.group_size is None else -(-self.k // self.group_size)
        return self.m * (self.k * (self.dtype.itemsize + 1) + 4 * groups)

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {"M": self.m, "K": self.k, "group_size": str(self.group_size)}


CASES = [
    # Vectors and single elements, short last groups, rows that are not multiples of 4.
    *(
        Fp8QuantizeCase(m, k, group_size, dtype)
        for group_size in (None, 128)
        for m, k in ((1, 128), (5, 576), (17, 1368), (3, 200), (8, 77), (2, 1), (130, 2112))
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ),
    # As many octets per thread as there are kernels for, and rows that are too long for any.
    *(
        Fp8QuantizeCase(2, k, group_size, dtype)
        for k in (16384, 28672, 57344, 69640)
        for group_size in (None, 128)
        for dtype in (torch.bfloat16, torch.float32)
    ),
    # Nothing to do, in each dimension; a row of no elements has a scale all the same.
    *(Fp8QuantizeCase(m, k, g) for m, k in ((0, 64), (4, 0)) for g in (None, 128)),
    # More rows than two dimensions of a grid may have.
    *(Fp8QuantizeCase(65537, 8, g) for g in (None, 128)),
]
BENCH = [
    Fp8QuantizeCase(m, k, group_size)
    for group_size in (None, 128)
    for k in (4096, 8192)
    for m in (1, 16, 256, 4096, 32768)
]
