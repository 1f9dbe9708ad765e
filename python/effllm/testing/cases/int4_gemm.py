"""Problems for int4_gemm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int4_gemm import dequantize_codes, int4_gemm_ref
from ...ops.int4_unpack import int4_unpack_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class Int4GemmCase(Case):
    """x [m, k] times a weight [n, k] in groups of ``group_size`` (-1: one group of k).

    Zero points, if there are any, are 0 .. ``max_zero``. ``perm`` permutes the columns of x.
    """

    m: int
    n: int
    k: int
    group_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    zeros: bool = False
    bias: bool = False
    scales_dtype: torch.dtype = torch.bfloat16
    max_zero: int = 255
    perm: bool = False
    op: ClassVar[str] = "int4_gemm"
    baseline_name: ClassVar[str] = "torch.mm"

    @property
    def group(self) -> int:
        return self.k if self.group_size == -1 else self.group_size

    @property
    def id(self) -> str:
        zeros = "-zeros" + ("" if self.max_zero == 255 else str(self.max_zero))
        options = (zeros if self.zeros else "") + ("-bias" if self.bias else "")
        options += "-perm" if self.perm else ""
        types = f"{str(self.dtype)[6:]}-s{str(self.scales_dtype)[6:]}"
        return f"m{self.m}-n{self.n}-k{self.k}-g{self.group_size}-{types}{options}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        groups = -(-self.k // self.group)
        x = normal(self.m, self.k, dtype=self.dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        # Any words are a packed weight. Unlike int4_pack these leave noise in the padding, too.
        words = (-(-self.n // 64), -(-self.k // 64) * 512)
        qweight = torch.randint(-(2**31), 2**31, words, generator=generator, dtype=torch.int32)
        scales = (torch.rand(self.n, groups, generator=generator) + 0.5).to(self.scales_dtype) / 64
        zeros = bias = None
        if self.zeros:  # any value of a byte is a zero point, not only those of four bits
            zeros = torch.randint(
                0, self.max_zero + 1, (self.n, groups), generator=generator, dtype=torch.uint8
            )
        if self.bias:
            bias = normal(self.n, dtype=self.dtype, seed=seed + 3)
        tensors = [x, qweight, scales, zeros, bias]
        if self.perm:
            tensors.append(torch.randperm(self.k, generator=generator).int())
        return (
            tuple(None if tensor is None else tensor.to(device) for tensor in tensors),
            {"group_size": self.group},
        )

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return int4_gemm_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.prepare_baseline(*args, **kwargs)()

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A dense layer over the dequantised weight in the dtype of x (cuBLAS on a GPU)."""
        x, qweight, scales, zeros, bias, *perm = args
        codes = int4_unpack_ref(qweight, self.n, self.k)
        weight = dequantize_codes(codes, scales, zeros, **kwargs).to(x.dtype)
        for order in perm:
            weight = torch.empty_like(weight).index_copy_(1, order.long(), weight)
        bias = None if bias is None else bias.to(x.dtype)
        return lambda: torch.nn.functional.linear(x, weight, bias)

    def bytes(self) -> int:
        groups = -(-self.k // self.group)
        codes = self.n * self.k // 2
        scales = self.n * groups * (self.scales_dtype.itemsize + self.zeros)
        return codes + scales + (self.m * (self.k + self.n)) * self.dtype.itemsize

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k, "M": self.m}


@dataclass(frozen=True)
class Int4PackBaselineCase(Int4GemmCase):
    """The same, beside torch's own int4 matmul for CPUs, which takes x and scales of one dtype."""

    baseline_name: ClassVar[str] = "torch int4pack"

    @property
    def id(self) -> str:
        return f"{super().id}-int4pack"

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """``_weight_int4pack_mm_for_cpu``, whose weight is ``(q - 8) * scale + offset``."""
        x, qweight, scales, zeros, bias = args
        codes = int4_unpack_ref(qweight, self.n, self.k).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        offsets = torch.zeros_like(scales) if zeros is None else (8 - zeros.to(x.dtype)) * scales
        pairs = torch.stack([scales.T, offsets.T], dim=-1).contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

        def run() -> Tensor:
            out = multiply(x, packed, kwargs["group_size"], pairs)
            return out if bias is None else out + bias

        return run


def _cases() -> list[Int4GemmCase]:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    cases = [
        # Every tile configuration and both sides of its limits.
        *(Int4GemmCase(m, 128, 256) for m in (1, 7, 8, 9, 32, 33, 64, 65, 200)),
        # Group sizes, zero points and bias in both 16-bit dtypes.
        *(
            Int4GemmCase(5, 192, 512, g, dtype, zeros, zeros, scales_dtype)
            for g in (32, 64, 128, -1)
            for dtype, scales_dtype in ((half, half), (bf16, fp32))
            for zeros in (False, True)
        ),
        # Tails: N and K off every tile, odd K (rows of x that are not even 4-byte aligned), short
        # last groups; K = 1000 in one group; one row; one column.
        *(
            Int4GemmCase(3, n, k, g, dtype, True, True)
            for n, k, g in ((40, 200, 64), (65, 1000, -1), (17, 333, 128), (1, 64, 32), (72, 1, 32))
            for dtype in (half, bf16)
        ),
        # Long K: slices of it are summed by several CTAs; rows of x that bulk copies can read.
        *(
            Int4GemmCase(m, n, k, g, dtype, zeros)
            for m, n, k, g, zeros in (
                (1, 64, 8192, 128, False),
                (12, 136, 4104, 64, True),
                (20, 200, 4096, -1, False),
                (64, 72, 2880, 128, True),
                (130, 320, 1032, -1, True),
            )
            for dtype in (half, bf16)
        ),
        # Few tokens and a K that many warps share on Hopper: short last steps, tiles and groups,
        # one block of rows and several per multiprocessor, scales of either 16-bit type.
        *(
            Int4GemmCase(m, n, k, g, dtype, zeros, not zeros, scales_dtype)
            for m, n, k, g, zeros in (
                (1, 40, 2080, 32, True),
                (2, 4240, 2048, 32, False),
                (5, 4240, 2112, 64, True),
                (8, 200, 4304, 64, False),
                (3, 6400, 2176, 128, True),
                (7, 72, 6616, 128, False),
                (8, 56, 10944, -1, True),
            )
            for dtype, scales_dtype in ((bf16, bf16), (half, half), (bf16, half))
        ),
        # Some more tokens, with one strip of W per block and with two, of which the last is alone.
        *(
            Int4GemmCase(m, n, k, g, dtype, zeros)
            for m, n, k, g, zeros in (
                (9, 1032, 4104, 64, True),
                (16, 16520, 1032, 128, False),
                (29, 4160, 1032, 128, True),
                (32, 4160, 2312, 64, False),
            )
            for dtype in (half, bf16)
        ),
        # Many tokens on Hopper: each tile shape with whole tiles and with tiles whose K a cluster
        # shares, several rounds, tails in M, N and K; scales that x's type holds and others.
        *(
            Int4GemmCase(m, n, k, g, dtype, zeros, zeros, scales_dtype)
            for m, n, k, g, zeros in (
                (40, 1032, 520, 64, True),
                (40, 1032, 1032, -1, False),
                (520, 2032, 520, 128, True),
                (520, 8032, 1032, 128, False),
                (520, 6032, 520, -1, True),
                (260, 3032, 4104, 64, True),
                (520, 4032, 520, 64, False),
                (390, 9032, 1032, 128, True),
            )
            for dtype, scales_dtype in ((bf16, bf16), (half, bf16) if zeros else (half, half))
        ),
        Int4GemmCase(130, 1032, 520, 128, bf16, True, True, fp32),
        # Permuted columns: gathered in the load, in a pass of their own for each of the kernels
        # that do not, and where the rows of x do not fit beside what they become.
        *(
            Int4GemmCase(m, n, k, g, dtype, zeros, not zeros, dtype, perm=True)
            for m, n, k, g, zeros in (
                (1, 72, 4096, 128, False),
                (8, 200, 2112, 64, True),
                (5, 40, 2056, -1, True),
                (8, 72, 8192, 128, False),
                (3, 65, 1001, 32, True),
                (20, 136, 4104, 64, True),
                (70, 264, 1032, 128, False),
            )
            for dtype in (half, bf16)
        ),
        # Nothing to do, in each dimension.
        *(Int4GemmCase(m, n, k, bias=True) for m, n, k in ((0, 64, 64), (4, 0, 64), (4, 64, 0))),
        Int4GemmCase(65537, 8, 64),
    ]
    return cases


CASES = _cases()
CPU_CASES = [
    *(
        Int4GemmCase(4, 96, 320, 64, torch.float32, zeros, zeros, torch.float32)
        for zeros in (False, True)
    ),
    # Zero points that a loop may look up (all up to 16), on both sides of that limit, of the number
    # of tokens from which weights are kept, and in one to four panels of them.
    *(
        Int4GemmCase(m, 96, 320, g, zeros=True, max_zero=max_zero)
        for m in (1, 4, 5, 30, 40, 67)
        for g in (32, 128)
        for max_zero in (16, 17)
    ),
]

# Layers of Llama-3-8B and 70B: qkv, o, gate_up, down.
MODEL_SHAPES = [
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
]
# What one of eight GPUs has of the 70B's.
SHARD_SHAPES = [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)]
BENCH = [
    Int4GemmCase(m, n, k, 128, torch.bfloat16)
    for shapes, tokens in (
        (MODEL_SHAPES, (1, 3, 4, 7, 16, 17, 32, 33, 64, 128, 256, 1024, 4096)),
        (SHARD_SHAPES, (1, 16, 64)),
    )
    for n, k in shapes
    for m in tokens
]
CPU_BENCH = [
    case_type(m, n, k, group_size, torch.bfloat16)
    for group_size in (64, 128)
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336))
    for m in (1, 4, 64)
    for case_type in (Int4GemmCase, Int4PackBaselineCase)
]
