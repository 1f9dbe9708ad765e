"""Problems for w4a8_gemm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int4_gemm import dequantize_codes, int4_gemm
from ...ops.int4_unpack import int4_unpack_ref
from ...ops.int8_quantize import int8_quantize, int8_quantize_ref
from ...ops.w4a8_gemm import MAX_MULTIPLIER, MAX_ZERO, w4a8_gemm, w4a8_gemm_ref
from ..case import Args, Case, Kwargs
from .fp8_gemm import random_scales
from .int4_gemm import MODEL_SHAPES, Int4GemmCase
from .int8_gemm import random_int8


@dataclass(frozen=True)
class W4A8GemmCase(Case):
    """x [m, k] in int8, with scales per "tensor" or "row", times a weight [n, k] of 4 bits in
    groups of ``group_size`` (-1: one group of k). Zero points, if any, are 0 .. ``max_zero``."""

    m: int
    n: int
    k: int
    group_size: int = 64
    out_dtype: torch.dtype = torch.bfloat16
    zeros: bool = False
    bias: bool = False
    scales_dtype: torch.dtype = torch.bfloat16
    x_per: str = "row"
    max_zero: int = MAX_ZERO
    dtype: ClassVar[torch.dtype] = torch.int8
    op: ClassVar[str] = "w4a8_gemm"
    math_bits: ClassVar[int] = 8
    baseline_name: ClassVar[str] = "torch.mm"

    @property
    def id(self) -> str:
        zeros = "-zeros" + ("" if self.max_zero == MAX_ZERO else str(self.max_zero))
        options = (zeros if self.zeros else "") + ("-bias" if self.bias else "")
        types = f"{self.x_per}-{str(self.out_dtype)[6:]}-s{str(self.scales_dtype)[6:]}"
        return f"m{self.m}-n{self.n}-k{self.k}-g{self.group_size}-{types}{options}"

    @property
    def weights(self) -> Int4GemmCase:
        """The problem of int4_gemm over the same weights, its x in bf16."""
        return Int4GemmCase(
            self.m,
            self.n,
            self.k,
            self.group_size,
            zeros=self.zeros,
            bias=self.bias,
            scales_dtype=self.scales_dtype,
            max_zero=self.max_zero,
        )

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        (_, *weights), options = self.weights.make(device, seed)
        x = random_int8(self.m, self.k, seed + 7, device)
        x_scales = random_scales(self.m, self.k, self.x_per, torch.float32, seed + 8).to(device)
        return (x, x_scales, *weights), options | {"out_dtype": self.out_dtype}

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return w4a8_gemm_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        if args[3].shape[1] == 1:
            return w4a8_gemm_ref(*args, **kwargs)
        return add_groups_in_order(*args, **kwargs)

    def dense(self, *weights: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The dequantised weight and the bias in bf16."""
        qweight, scales, zeros, bias = weights
        codes = int4_unpack_ref(qweight, self.n, self.k)
        weight = dequantize_codes(codes, scales, zeros, group_size=kwargs["group_size"])
        return weight.bfloat16(), bias

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A dense layer in bf16 over the dequantised operands (cuBLAS on a GPU)."""
        x, _, *weights = args
        rows, (weight, bias) = x.bfloat16(), self.dense(*weights, **kwargs)
        return lambda: torch.nn.functional.linear(rows, weight, bias)

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """The same weights with x in bf16."""
        x, _, *weights = args
        rows, group_size = x.bfloat16(), kwargs["group_size"]
        return {"int4_gemm": lambda: int4_gemm(rows, *weights, group_size=group_size)}

    def bytes(self) -> int:
        groups = -(-self.k // self.weights.group)
        scales = self.n * groups * (self.scales_dtype.itemsize + self.zeros)
        x_scales = 4 * (self.m if self.x_per == "row" else 1)
        out = self.m * self.n * self.out_dtype.itemsize
        return self.n * self.k // 2 + scales + self.m * self.k + x_scales + out

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k, "M": self.m, "group_size": self.group_size}


@dataclass(frozen=True)
class TwoLevelW4A8GemmCase(W4A8GemmCase):
    """Groups have integers for scales, rows a float."""

    variant: ClassVar[str] = "multipliers"

    @property
    def id(self) -> str:
        return f"multipliers-{super().id}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        (x, x_scales, qweight, _, _, bias), options = super().make(device, seed)
        generator = torch.Generator().manual_seed(seed + 9)
        scales = (torch.rand(self.n, 1, generator=generator) + 0.5).to(self.scales_dtype) / 512
        multipliers = torch.randint(
            0,
            MAX_MULTIPLIER + 1,
            (self.n, -(-self.k // self.weights.group)),
            generator=generator,
            dtype=torch.uint8,
        )
        weights = (qweight, scales.to(device), None, bias, multipliers.to(device))
        return (x, x_scales, *weights), options

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        return w4a8_gemm_ref(*args, **kwargs)

    def dense(self, *weights: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().dense(*in_one_level(*weights), **kwargs)

    def prepare_others(
        self, x: Tensor, x_scales: Tensor, *weights: Any, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        return super().prepare_others(x, x_scales, *in_one_level(*weights), **kwargs)

    def bytes(self) -> int:
        groups = -(-self.k // self.weights.group)
        scales = self.n * (groups + self.scales_dtype.itemsize)
        return super().bytes() - self.n * groups * self.scales_dtype.itemsize + scales


def in_one_level(
    qweight: Tensor, scales: Tensor, zeros: None, bias: Tensor | None, multipliers: Tensor
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """The same weights with a float for each group: scales times multipliers, rounded."""
    return qweight, (multipliers * scales.float()).to(scales.dtype), zeros, bias


def add_groups_in_order(
    x: Tensor,
    x_scales: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """What the contract says of several groups, to the bit: sums of a group are integers below
    2^24, one operation of fp32 comes after another."""
    k, groups = x.shape[-1], scales.shape[1]
    ones = torch.ones_like(scales, dtype=torch.float32)
    codes = int4_unpack_ref(qweight, scales.shape[0], k)
    weight = dequantize_codes(codes, ones, zeros, group_size=group_size)
    total = x.new_zeros((*x.shape[:-1], scales.shape[0]), dtype=torch.float32)
    for group in range(groups):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = x[..., columns].float() @ weight[:, columns].T
        products = sums * scales[:, group].float()
        total = total + products
    total = total * (x_scales.reshape(1) if x_scales.numel() == 1 else x_scales).float()
    if bias is not None:
        total = total + bias.float()
    return total.to(out_dtype)


def quantize_and_multiply(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """What a linear layer does with x [M, K] in 16 bits: two ops."""
    codes, x_scales = int8_quantize(x)
    return w4a8_gemm(
        codes, x_scales, qweight, scales, zeros, bias, group_size=group_size, out_dtype=out_dtype
    )


@dataclass(frozen=True)
class QuantizedW4A8GemmCase(W4A8GemmCase):
    """int8_quantize and w4a8_gemm together: x [m, k] comes in bf16."""

    variant: ClassVar[str] = "int8_quantize"

    @property
    def id(self) -> str:
        return f"quantize-{super().id}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        args, options = self.weights.make(device, seed)
        return args, options | {"out_dtype": self.out_dtype}

    def reference(self, x: Tensor, *weights: Any, **kwargs: Any) -> Tensor:
        return super().reference(*int8_quantize_ref(x), *weights, **kwargs)

    def baseline(self, x: Tensor, *weights: Any, **kwargs: Any) -> Tensor:
        return super().baseline(*int8_quantize_ref(x), *weights, **kwargs)

    def prepare_baseline(self, x: Tensor, *weights: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """The dense layer needs no quantising of x."""
        return super().prepare_baseline(x, None, *weights, **kwargs)

    def prepare_others(
        self, x: Tensor, *weights: Any, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        """The matmul alone."""
        codes = (*int8_quantize_ref(x), *weights)
        return {"w4a8_gemm alone": lambda: w4a8_gemm(*codes, **kwargs)}

    def bytes(self) -> int:
        return super().bytes() + self.m * self.k  # x has two bytes


_HALF, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = [
    # Every tile configuration and both sides of its limits.
    *(W4A8GemmCase(m, 128, 256, g) for m in (1, 7, 8, 9, 32, 33, 64, 65, 200) for g in (64, -1)),
    # Group sizes, zero points, bias and scales of x; every dtype of out and of scales.
    *(
        W4A8GemmCase(5, 192, 512, g, dtype, zeros, zeros, scales_dtype, per)
        for g in (32, 64, 128, -1)
        for dtype, scales_dtype, per in (
            (_HALF, _HALF, "row"),
            (_BF16, _FP32, "tensor"),
            (_FP32, _BF16, "row"),
        )
        for zeros in (False, True)
    ),
    # Tails: N and K off every tile; odd K, whose rows start anywhere; short last groups; K = 1000
    # in one group; one row; one column.
    *(
        W4A8GemmCase(3, n, k, g, dtype, True, True)
        for n, k, g in (
            (40, 200, 64),
            (65, 1000, -1),
            (17, 333, 128),
            (33, 77, -1),
            (200, 2112, 32),
            (1, 64, 32),
            (72, 1, 32),
            (8, 1, -1),
        )
        for dtype in (_BF16, _FP32)
    ),
    # Long K, which slices of a block share.
    *(
        W4A8GemmCase(m, n, k, g, dtype, zeros)
        for m, n, k, g, zeros in (
            (1, 64, 8192, 128, False),
            (12, 136, 4112, 64, True),
            (20, 200, 4096, -1, False),
            (64, 72, 2880, 128, True),
            (130, 320, 1040, -1, True),
        )
        for dtype in (_BF16, _FP32)
    ),
    # Zero points as checkpoints have them.
    *(W4A8GemmCase(m, 96, 320, g, zeros=True, max_zero=16) for m in (2, 40) for g in (32, 128)),
    # Integers for the scales of groups: every size of these and tile of tokens; tails, odd K, short
    # last groups; long K; every dtype of out and of scales.
    *(TwoLevelW4A8GemmCase(m, 128, 256, g) for m in (1, 9, 33, 65, 200) for g in (32, 64, 128, -1)),
    *(
        TwoLevelW4A8GemmCase(m, n, k, g, dtype, False, True, scales_dtype, per)
        for m, n, k, g in (
            (3, 40, 200, 64),
            (3, 17, 333, 128),
            (70, 33, 77, -1),
            (3, 200, 2112, 32),
            (3, 1, 64, 32),
            (3, 72, 1, 32),
            (20, 200, 4096, 128),
            (130, 320, 1040, 32),
        )
        for dtype, scales_dtype, per in ((_BF16, _FP32, "row"), (_FP32, _HALF, "tensor"))
    ),
    # Nothing to do, in each dimension.
    *(
        case_type(m, n, k, bias=True)
        for case_type in (W4A8GemmCase, TwoLevelW4A8GemmCase)
        for m, n, k in ((0, 64, 64), (4, 0, 64), (4, 64, 0))
    ),
    W4A8GemmCase(65537, 8, 64),
]
BENCH = [
    case_type(m, n, k, g)
    for case_type, g in ((W4A8GemmCase, 128), (TwoLevelW4A8GemmCase, 128), (W4A8GemmCase, -1))
    for n, k in MODEL_SHAPES
    for m in (1, 16, 64, 128, 256, 1024, 4096)
]
QUANTIZED_BENCH = [
    QuantizedW4A8GemmCase(m, n, k, 128) for n, k in MODEL_SHAPES for m in (1, 16, 64, 1024)
]
