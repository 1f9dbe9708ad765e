"""Problems for int8_gemm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int8_gemm import int8_gemm, int8_gemm_ref
from ...ops.int8_quantize import int8_quantize, int8_quantize_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal
from .fp8_gemm import random_scales
from .int4_gemm import MODEL_SHAPES


def random_int8(n: int, k: int, seed: int, device: str | torch.device = "cpu") -> Tensor:
    """Every int8, -128 too, [n, k]."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8, device=device)


@dataclass(frozen=True)
class Int8GemmCase(Case):
    """x [m, k] with scales per "tensor" or "row" times a weight [n, k] with scales per "tensor" or
    "row" (its channels); zero points of x per "tensor" or "row", or none."""

    m: int
    n: int
    k: int
    x_per: str = "row"
    w_per: str = "row"
    out_dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    scales_dtype: torch.dtype = torch.float32
    zeros_per: str | None = None
    w_sums: bool = False
    """The sums of the weight's rows are given."""
    dtype: ClassVar[torch.dtype] = torch.int8
    op: ClassVar[str] = "int8_gemm"
    math_bits: ClassVar[int] = 8
    baseline_name: ClassVar[str] = "torch.mm"

    @property
    def id(self) -> str:
        zeros = "" if self.zeros_per is None else f"-zeros_{self.zeros_per}"
        options = ("-bias" if self.bias else "") + zeros + ("-sums" if self.w_sums else "")
        types = f"{str(self.out_dtype)[6:]}-s{str(self.scales_dtype)[6:]}"
        return f"m{self.m}-n{self.n}-k{self.k}-{self.x_per}-{self.w_per}-{types}{options}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = random_int8(self.m, self.k, seed, device)
        x_scales = random_scales(self.m, self.k, self.x_per, self.scales_dtype, seed + 1)
        weight = random_int8(self.n, self.k, seed + 2, device)
        w_scales = random_scales(self.n, self.k, self.w_per, self.scales_dtype, seed + 3)
        bias = normal(self.n, dtype=torch.bfloat16, seed=seed + 4) if self.bias else None
        zeros = w_sums = None
        if self.zeros_per is not None:
            zeros = random_int8(self.m if self.zeros_per == "row" else 1, 1, seed + 5)
        if self.w_sums:
            w_sums = weight.sum(1, dtype=torch.int32)
        tensors = (x, x_scales, weight, w_scales, bias, zeros, w_sums)
        return (
            tuple(None if tensor is None else tensor.to(device) for tensor in tensors),
            {"out_dtype": self.out_dtype},
        )

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return int8_gemm_ref(*args, **kwargs)

    baseline = reference

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A dense layer in bf16 over the dequantised operands (cuBLAS on a GPU)."""
        x, _, weight, w_scales, bias, *_ = args
        rows, dense = x.bfloat16(), (weight * w_scales).bfloat16()
        return lambda: torch.nn.functional.linear(rows, dense, bias)

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """torch's int8 matmul (cuBLASLt, oneDNN), which leaves int32 to scale."""
        x, _, weight, *_ = args
        return {"torch._int_mm": lambda: torch._int_mm(x, weight.T)}

    def bytes(self) -> int:
        out = self.m * self.n * self.out_dtype.itemsize
        scales = {"tensor": 1, "row": self.m}[self.x_per] + {"tensor": 1, "row": self.n}[self.w_per]
        return self.n * self.k + self.m * self.k + out + 4 * scales

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k, "M": self.m, "scales": f"{self.x_per} x {self.w_per}"}


def quantize_and_multiply(
    x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None, *, out_dtype: torch.dtype
) -> Tensor:
    """What a linear layer in int8 does with x [M, K] in 16 bits: two ops."""
    codes, x_scales = int8_quantize(x)
    return int8_gemm(codes, x_scales, weight, w_scales, bias, out_dtype=out_dtype)


@dataclass(frozen=True)
class QuantizedInt8GemmCase(Int8GemmCase):
    """int8_quantize and int8_gemm together: x [m, k] comes in bf16."""

    variant: ClassVar[str] = "int8_quantize"

    @property
    def id(self) -> str:
        return f"quantize-{super().id}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        (_, _, *others), options = super().make(device, seed)
        x = normal(self.m, self.k, dtype=torch.bfloat16, device=device, seed=seed)
        return (x, *others[:3]), options

    def reference(self, x: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        return int8_gemm_ref(*int8_quantize_ref(x), *others, **kwargs)

    baseline = reference

    def prepare_baseline(self, x: Tensor, *others: Any, **_: Any) -> Callable[[], Tensor]:
        """The dense layer needs no quantising of x."""
        return super().prepare_baseline(x, None, *others)

    def prepare_others(self, x: Tensor, *others: Any, **_: Any) -> dict[str, Callable[[], Any]]:
        """The matmul alone."""
        codes = (*int8_quantize_ref(x), *others)
        return {"int8_gemm alone": lambda: int8_gemm(*codes, out_dtype=self.out_dtype)}

    def bytes(self) -> int:
        return super().bytes() + self.m * self.k  # x has two bytes


_HALF, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
PAIRS = [(x_per, w_per) for x_per in ("tensor", "row") for w_per in ("tensor", "row")]
CASES = [
    # Every tile configuration and both sides of its limits.
    *(Int8GemmCase(m, 128, 256) for m in (1, 7, 8, 9, 32, 33, 64, 65, 200)),
    # Every mixture of granularities; out dtypes and those of scales.
    *(Int8GemmCase(5, 192, 512, *pair, _FP32) for pair in PAIRS),
    *(Int8GemmCase(37, 200, 384, *pair, _HALF, True) for pair in PAIRS),
    *(Int8GemmCase(3, 304, 304, scales_dtype=dtype) for dtype in (_HALF, _BF16)),
    # Zero points of each granularity, with and without the sums of the weight's rows.
    *(
        Int8GemmCase(m, n, k, "row", "row", dtype, True, zeros_per=per, w_sums=sums)
        for m, n, k, dtype in ((6, 200, 320, _FP32), (70, 136, 272, _BF16), (3, 33, 77, _HALF))
        for per in ("tensor", "row")
        for sums in (False, True)
    ),
    # Tails: N and K off every tile; odd K, whose rows start anywhere; a K of 8 and of 4 bytes
    # beyond 16; one row; one column.
    *(
        Int8GemmCase(m, n, k, bias=True, out_dtype=dtype)
        for m, n, k in (
            (3, 576, 448),
            (9, 200, 2112),
            (33, 65, 1368),
            (17, 130, 1004),
            (2, 33, 333),
            (4, 1, 200),
            (6, 72, 1),
        )
        for dtype in (_BF16, _FP32)
    ),
    # Long K, which slices of a block share.
    *(
        Int8GemmCase(m, n, k, out_dtype=dtype)
        for m, n, k in ((1, 64, 8192), (12, 136, 4104), (130, 320, 1040))
        for dtype in (_BF16, _FP32)
    ),
    # Nothing to do, in each dimension.
    *(
        Int8GemmCase(m, n, k, bias=True, zeros_per=per)
        for m, n, k in ((0, 64, 64), (4, 0, 64), (4, 64, 0))
        for per in (None, "tensor")
    ),
    Int8GemmCase(65537, 8, 64),
]
BENCH = [Int8GemmCase(m, n, k) for n, k in MODEL_SHAPES for m in (1, 16, 64, 128, 256, 1024, 4096)]
QUANTIZED_BENCH = [
    QuantizedInt8GemmCase(m, n, k) for n, k in MODEL_SHAPES for m in (1, 16, 64, 1024)
]
