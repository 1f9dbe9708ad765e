"""Problems for fp8_gemm, and the weights of those for fp8_weight_gemm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.fp8_gemm import dequantize_weight, fp8_gemm, fp8_gemm_ref, grouped_product
from ...ops.fp8_quantize import fp8_quantize, fp8_quantize_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal
from .int4_gemm import MODEL_SHAPES


def random_codes(n: int, k: int, seed: int, device: str | torch.device = "cpu") -> Tensor:
    """Every e4m3 but NaN, float8_e4m3fn [n, k]."""
    generator = torch.Generator(device).manual_seed(seed)
    magnitudes, signs = (
        torch.randint(high, (n, k), generator=generator, dtype=torch.uint8, device=device)
        for high in (127, 2)
    )
    return (magnitudes | signs << 7).view(torch.float8_e4m3fn)


def random_scales(n: int, k: int, per: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Scales of a weight or of x [n, k] per "tensor", "row", "group" of 128 or "block"."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // 128)
    shapes = {"tensor": (1,), "row": (n, 1), "group": (n, groups), "block": (-(-n // 128), groups)}
    # Magnitudes far apart, so that a scale of another row or group shows.
    scales = torch.rand(shapes[per], generator=generator) + 0.25
    return (scales / 256).to(dtype)


@dataclass(frozen=True)
class Fp8GemmCase(Case):
    """x [m, k] with scales per "tensor", "row" or "group" times a weight [n, k] with scales per
    "tensor", "row" (its channels) or "block"."""

    m: int
    n: int
    k: int
    x_per: str = "row"
    w_per: str = "row"
    out_dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    scales_dtype: torch.dtype = torch.float32
    quantized: bool = True
    """x and its scales come from fp8_quantize, in its layout; else x has every code."""
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    op: ClassVar[str] = "fp8_gemm"
    math_bits: ClassVar[int] = 8
    baseline_name: ClassVar[str] = "torch.mm"

    @property
    def variant(self) -> str:  # type: ignore[override]
        """What scales the result row is about, where peers were measured with them."""
        pairs = {("row", "row"): "row", ("group", "block"): "block", ("tensor", "tensor"): "tensor"}
        return pairs.get((self.x_per, self.w_per), "")

    @property
    def id(self) -> str:
        options = ("-bias" if self.bias else "") + ("" if self.quantized else "-codes")
        types = f"{str(self.out_dtype)[6:]}-s{str(self.scales_dtype)[6:]}"
        return f"m{self.m}-n{self.n}-k{self.k}-{self.x_per}-{self.w_per}-{types}{options}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        if self.quantized and self.x_per != "tensor":
            group_size = 128 if self.x_per == "group" else None
            x = normal(self.m, self.k, seed=seed, device=device)
            x, x_scales = fp8_quantize_ref(x, group_size=group_size)
            x_scales = x_scales.to(self.scales_dtype)
            if self.x_per == "group":
                # As fp8_quantize has them: each group's for all rows from a multiple of four.
                memory = x_scales.new_zeros(x_scales.shape[1], -(-self.m // 4) * 4)
                memory[:, : self.m] = x_scales.T
                x_scales = memory[:, : self.m].T
        else:
            x = random_codes(self.m, self.k, seed, device)
            x_scales = random_scales(self.m, self.k, self.x_per, self.scales_dtype, seed + 1)
        weight = random_codes(self.n, self.k, seed + 2, device)
        w_scales = random_scales(self.n, self.k, self.w_per, self.scales_dtype, seed + 3)
        bias = normal(self.n, dtype=torch.bfloat16, seed=seed + 4) if self.bias else None
        tensors = (x, x_scales, weight, w_scales, bias)
        return (
            tuple(None if tensor is None else tensor.to(device) for tensor in tensors),
            {"out_dtype": self.out_dtype},
        )

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return fp8_gemm_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        """The definition in fp32, rounded once: what a GEMM of exact products can keep."""
        x, x_scales, weight, w_scales, bias = args
        out = grouped_product(x, x_scales, weight, w_scales, torch.float32)
        return (out if bias is None else out + bias.float()).to(self.out_dtype)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A dense layer in bf16 over the dequantised operands (cuBLAS on a GPU)."""
        x, _, weight, w_scales, bias = args
        rows = x.bfloat16()
        dense = dequantize_weight(weight, w_scales, torch.bfloat16)
        return lambda: torch.nn.functional.linear(rows, dense, bias)

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """torch's matmul of the same codes; where scales come last, both ways to sum."""
        x, x_scales, weight, w_scales, bias = args
        columns = {"tensor": w_scales, "row": w_scales.T.contiguous(), "block": w_scales.T}
        # Scales of groups cuBLAS has for multiples of four tokens alone.
        is_taken = self.variant in columns and (self.variant != "block" or self.m % 4 == 0)
        if not x.is_cuda or not is_taken:
            return {}
        scaled_mm = partial(
            torch._scaled_mm,
            x,
            weight.T,
            x_scales,
            columns[self.variant],
            bias,
            out_dtype=self.out_dtype,
        )
        if self.variant == "block":
            return {"torch._scaled_mm": scaled_mm}
        return {
            "torch._scaled_mm": partial(scaled_mm, use_fast_accum=True),
            "torch._scaled_mm, accurate": scaled_mm,
            "fp8_gemm, fast": partial(fp8_gemm, *args, out_dtype=self.out_dtype, accurate=False),
        }

    def bytes(self) -> int:
        out = self.m * self.n * self.out_dtype.itemsize
        return self.n * self.k + self.m * self.k + out + 4 * self.num_scales()

    def num_scales(self) -> int:
        """Of x and the weight together."""
        groups = -(-self.k // 128)
        of_x = {"tensor": 1, "row": self.m, "group": self.m * groups}[self.x_per]
        return of_x + {"tensor": 1, "row": self.n, "block": -(-self.n // 128) * groups}[self.w_per]

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k, "M": self.m, "scales": f"{self.x_per} x {self.w_per}"}


def quantize_and_multiply(
    x: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    *,
    group_size: int | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """What a linear layer in FP8 does with x [M, K] in 16 bits: two ops."""
    codes, x_scales = fp8_quantize(x, group_size=group_size)
    return fp8_gemm(codes, x_scales, weight, w_scales, bias, out_dtype=out_dtype)


@dataclass(frozen=True)
class QuantizedFp8GemmCase(Fp8GemmCase):
    """fp8_quantize and fp8_gemm together: x [m, k] comes in bf16."""

    @property
    def variant(self) -> str:  # type: ignore[override]
        return f"{super().variant} + fp8_quantize"

    @property
    def id(self) -> str:
        return f"quantize-{super().id}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        (_, _, *others), options = super().make(device, seed)
        x = normal(self.m, self.k, dtype=torch.bfloat16, device=device, seed=seed)
        return (x, *others), options | {"group_size": 128 if self.x_per == "group" else None}

    def gemm_args(self, x: Tensor, *others: Any, group_size: int | None, **_: Any) -> Args:
        """The arguments of fp8_gemm alone."""
        return *fp8_quantize_ref(x, group_size=group_size), *others

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().reference(*self.gemm_args(*args, **kwargs), out_dtype=self.out_dtype)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().baseline(*self.gemm_args(*args, **kwargs))

    def prepare_baseline(self, x: Tensor, *others: Any, **_: Any) -> Callable[[], Tensor]:
        """The dense layer needs no quantising of x."""
        return super().prepare_baseline(x, None, *others)

    def prepare_others(
        self, x: Tensor, *others: Any, group_size: int | None, **_: Any
    ) -> dict[str, Callable[[], Any]]:
        """The matmul alone, ours and torch's."""
        codes = (*fp8_quantize(x, group_size=group_size), *others)
        alone = {"fp8_gemm alone": partial(fp8_gemm, *codes, out_dtype=self.out_dtype)}
        return alone | super().prepare_others(*codes)

    def bytes(self) -> int:
        return super().bytes() + self.m * self.k  # x has two bytes


_HALF, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
PAIRS = [
    (x_per, w_per) for x_per in ("tensor", "row", "group") for w_per in ("tensor", "row", "block")
]
CASES = [
    # Every tile configuration and both sides of its limits.
    *(Fp8GemmCase(m, 128, 256) for m in (1, 7, 8, 9, 32, 33, 64, 65, 200)),
    # Every mixture of granularities; every code; out dtypes and those of scales.
    *(Fp8GemmCase(5, 192, 512, *pair, _FP32, quantized=False) for pair in PAIRS),
    *(Fp8GemmCase(37, 200, 384, *pair, _HALF, True) for pair in PAIRS),
    *(Fp8GemmCase(3, 300, 300, "group", "block", scales_dtype=dtype) for dtype in (_HALF, _BF16)),
    # Tails: N and K off every tile and block, as 576 and 2112 are; odd K, whose rows start
    # anywhere; a K of 8 and of 4 bytes beyond 16; one row; one column.
    *(
        Fp8GemmCase(m, n, k, *pair, bias=True)
        for m, n, k in (
            (3, 576, 448),
            (9, 200, 2112),
            (33, 65, 1368),
            (17, 130, 1004),
            (2, 33, 333),
            (4, 1, 200),
            (6, 72, 1),
        )
        for pair in (("row", "row"), ("group", "block"))
    ),
    # Long K, which slices of a block share.
    *(
        Fp8GemmCase(m, n, k, *pair)
        for m, n, k in ((1, 64, 8192), (12, 136, 4104), (130, 320, 1032))
        for pair in (("tensor", "tensor"), ("row", "row"), ("group", "block"))
    ),
    # Nothing to do, in each dimension.
    *(
        Fp8GemmCase(m, n, k, *pair, bias=True)
        for m, n, k in ((0, 64, 64), (4, 0, 64), (4, 64, 0))
        for pair in (("row", "row"), ("group", "block"))
    ),
    Fp8GemmCase(65537, 8, 64),
]
# Shapes of DeepSeek-V3 beside those of Llama.
FP8_SHAPES = [
    *MODEL_SHAPES,
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (7168, 2048),
]
BENCH = [
    Fp8GemmCase(m, n, k, *pair)
    for pair in (("row", "row"), ("group", "block"), ("tensor", "tensor"))
    for n, k in FP8_SHAPES
    for m in (1, 16, 64, 128, 1024, 4096)
]
QUANTIZED_BENCH = [
    QuantizedFp8GemmCase(m, n, k, *pair)
    for pair in (("row", "row"), ("group", "block"))
    for n, k in MODEL_SHAPES
    for m in (1, 16, 64, 1024)
]
