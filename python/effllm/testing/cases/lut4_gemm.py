"""Problems for lut4_gemm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.int4_unpack import int4_unpack_ref
from ...ops.lut4_gemm import decode, lut4_gemm_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal
from .int4_gemm import MODEL_SHAPES


@dataclass(frozen=True)
class Lut4GemmCase(Case):
    """x [m, k] times a weight [n, k] of codes in groups of ``group_size`` (-1: one group of k).

    ``codebook`` is what has one each: "tensor", "row" or "group".
    """

    m: int
    n: int
    k: int
    group_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    codebook: str = "tensor"
    scales: bool = True
    bias: bool = False
    codebook_dtype: torch.dtype | None = None
    """None: that of x."""
    op: ClassVar[str] = "lut4_gemm"
    baseline_name: ClassVar[str] = "torch.mm"

    @property
    def group(self) -> int:
        return self.k if self.group_size == -1 else self.group_size

    @property
    def table_dtype(self) -> torch.dtype:
        return self.codebook_dtype or self.dtype

    @property
    def table_shape(self) -> tuple[int, ...]:
        shapes = {
            "tensor": (16,),
            "row": (self.n, 16),
            "group": (self.n, -(-self.k // self.group), 16),
        }
        return shapes[self.codebook]

    @property
    def id(self) -> str:
        options = ("-scales" if self.scales else "") + ("-bias" if self.bias else "")
        types = f"{str(self.dtype)[6:]}-c{str(self.table_dtype)[6:]}"
        sizes = f"m{self.m}-n{self.n}-k{self.k}-g{self.group_size}"
        return f"{sizes}-{types}-{self.codebook}{options}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        x = normal(self.m, self.k, dtype=self.dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        # Any words are a packed weight. Unlike int4_pack these leave noise in the padding, too.
        words = (-(-self.n // 64), -(-self.k // 64) * 512)
        qweight = torch.randint(-(2**31), 2**31, words, generator=generator, dtype=torch.int32)
        # Signs and magnitudes in no order, so that every bit of an entry counts.
        codebook = torch.randn(self.table_shape, generator=generator).to(self.table_dtype)
        scales = bias = None
        if self.scales:
            groups = -(-self.k // self.group)
            scales = (torch.rand(self.n, groups, generator=generator) + 0.5).bfloat16() / 16
        if self.bias:
            bias = normal(self.n, dtype=self.dtype, seed=seed + 3)
        tensors = (x, qweight, codebook, scales, bias)
        return (
            tuple(None if tensor is None else tensor.to(device) for tensor in tensors),
            {"group_size": self.group},
        )

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return lut4_gemm_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.prepare_baseline(*args, **kwargs)()

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
        """A dense layer over the decoded weight in the dtype of x (cuBLAS on a GPU)."""
        x, qweight, codebook, scales, bias = args
        codes = int4_unpack_ref(qweight, self.n, self.k)
        weight = decode(codes, codebook, scales, **kwargs).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return lambda: torch.nn.functional.linear(x, weight, bias)

    def bytes(self) -> int:
        groups = -(-self.k // self.group)
        codes = self.n * self.k // 2
        tables = torch.Size(self.table_shape).numel() * self.table_dtype.itemsize
        scales = 2 * self.n * groups if self.scales else 0
        return codes + tables + scales + (self.m * (self.k + self.n)) * self.dtype.itemsize

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k, "M": self.m, "codebook": self.codebook}


def _cases() -> list[Lut4GemmCase]:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    cases = [
        # Every tile configuration and both sides of its limits.
        *(Lut4GemmCase(m, 128, 256) for m in (1, 7, 8, 9, 32, 33, 64, 65, 200)),
        # Group sizes and what shares a codebook, with and without scales and bias.
        *(
            Lut4GemmCase(5, 192, 512, g, dtype, codebook, scales, scales)
            for g in (32, 64, 128, -1)
            for codebook in ("tensor", "row", "group")
            for dtype, scales in ((half, True), (bf16, False))
        ),
        # Codebooks of other dtypes are rounded to that of x.
        *(
            Lut4GemmCase(5, 128, 256, 64, dtype, "row", codebook_dtype=other)
            for dtype in (half, bf16)
            for other in (half, bf16, fp32)
            if other != dtype
        ),
        # Tails: N and K off every tile, odd K (rows of x that are not even 4-byte aligned), short
        # last groups, a last tile of one group; K = 1000 in one group; one row; one column.
        *(
            Lut4GemmCase(3, n, k, g, dtype, codebook, bias=True)
            for n, k, g, codebook in (
                (40, 200, 64, "group"),
                (65, 1000, -1, "row"),
                (17, 333, 128, "group"),
                (33, 352, 32, "group"),
                (1, 64, 32, "row"),
                (72, 1, 32, "tensor"),
            )
            for dtype in (half, bf16)
        ),
        # Long K, which slices of a block or of a cluster share.
        *(
            Lut4GemmCase(m, n, k, g, bf16, codebook)
            for m, n, k, g, codebook in (
                (1, 64, 8192, 128, "tensor"),
                (12, 136, 4104, 64, "group"),
                (20, 200, 4096, -1, "row"),
                (130, 320, 1032, 128, "tensor"),
            )
        ),
        # The same on Hopper, whose kernels for few and for some tokens want no codebook per group.
        *(
            Lut4GemmCase(m, n, k, g, dtype, codebook, scales, not scales)
            for m, n, k, g, codebook, scales in (
                (1, 40, 2080, 32, "row", True),
                (5, 4240, 2112, 64, "tensor", True),
                (8, 200, 4304, 128, "row", True),
                (3, 6400, 2176, -1, "row", False),
                (9, 4160, 2560, 64, "row", True),
                (31, 9280, 1024, 128, "tensor", True),
                (33, 136, 2560, -1, "row", False),
            )
            for dtype in (half, bf16)
        ),
        # Nothing to do, in each dimension.
        *(
            Lut4GemmCase(m, n, k, codebook=codebook, bias=True)
            for m, n, k in ((0, 64, 64), (4, 0, 64), (4, 64, 0))
            for codebook in ("tensor", "group")
        ),
        Lut4GemmCase(65537, 8, 64),
    ]
    return cases


CASES = _cases()
CPU_CASES = [
    Lut4GemmCase(m, 96, k, 32, torch.float32, codebook, scales, not scales)
    for m, k in ((4, 352), (6, 320))
    for codebook in ("tensor", "row", "group")
    for scales in (False, True)
]

# All for NF4; some for codebooks by k-means, which cost more to fetch: per row and per group.
BENCH = [
    Lut4GemmCase(m, n, k, 128, torch.bfloat16, codebook, codebook == "tensor")
    for codebook, tokens in (
        ("tensor", (1, 4, 16, 32, 64, 128, 256, 1024, 4096)),
        ("row", (1, 16, 256)),
        ("group", (1, 16, 256)),
    )
    for n, k in MODEL_SHAPES
    for m in tokens
]
