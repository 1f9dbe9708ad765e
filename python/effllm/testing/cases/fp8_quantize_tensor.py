"""Problems for fp8_quantize_tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.fp8_quantize_tensor import fp8_quantize_tensor_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class Fp8QuantizeTensorCase(Case):
    """x [m, k] with one scale, a known one of ``scale_dtype`` or its own."""

    m: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype | None = None
    op: ClassVar[str] = "fp8_quantize_tensor"

    @property
    def id(self) -> str:
        known = "" if self.scale_dtype is None else f"-static-{str(self.scale_dtype)[6:]}"
        return f"m{self.m}-k{self.k}-{str(self.dtype)[6:]}{known}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=self.dtype, device=device, seed=seed)
        if self.scale_dtype is None:
            return (x,), {}
        # Small enough that the outliers saturate.
        return (x, torch.tensor([0.0123], dtype=self.scale_dtype, device=device)), {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return fp8_quantize_tensor_ref(*args, **kwargs)

    baseline = reference

    def bytes(self) -> int:
        return self.m * self.k * (self.dtype.itemsize + 1) + 4

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {"M": self.m, "K": self.k, "scale": "x" if self.scale_dtype is None else "static"}


_HALF, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = [
    # Vectors and single elements; several chunks of threads.
    *(
        Fp8QuantizeTensorCase(m, k, dtype, scale_dtype)
        for m, k in ((1, 128), (5, 77), (1, 1), (37, 2112))
        for dtype in (_HALF, _BF16, _FP32)
        for scale_dtype in (None, _FP32)
    ),
    *(Fp8QuantizeTensorCase(3, 64, scale_dtype=scale_dtype) for scale_dtype in (_HALF, _BF16)),
    # More than the blocks of a GPU take in one pass.
    Fp8QuantizeTensorCase(1024, 4096),
    # Nothing to do.
    *(Fp8QuantizeTensorCase(0, 64, scale_dtype=scale_dtype) for scale_dtype in (None, _FP32)),
]
BENCH = [
    Fp8QuantizeTensorCase(m, k, scale_dtype=scale_dtype)
    for scale_dtype in (None, _FP32)
    for k in (4096, 8192)
    for m in (1, 16, 256, 4096, 32768)
]
