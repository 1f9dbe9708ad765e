"""Problems for rms_norm_fp8_quantize, and with a residual for add_rms_norm_fp8_quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.rms_norm_fp8_quantize import rms_norm_fp8_quantize_ref
from ...ops.silu_mul_fp8_quantize import codes_and_scales_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal
from .silu_mul_fp8_quantize import known_scale, unfused_quantize


def hugging_face_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LlamaRMSNorm.forward."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return weight * values.to(x.dtype)


@dataclass(frozen=True)
class RmsNormFp8QuantizeCase(Case):
    """x [m, k] in groups of ``group_size``, None: one scale per row; or with a known scale of
    ``scale_dtype``. Rows of x lie ``gap`` elements apart."""

    m: int
    k: int
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype | None = None
    gap: int = 0
    op: ClassVar[str] = "rms_norm_fp8_quantize"

    @property
    def id(self) -> str:
        known = "" if self.scale_dtype is None else f"-static-{str(self.scale_dtype)[6:]}"
        known += f"-gap{self.gap}" if self.gap else ""
        return f"m{self.m}-k{self.k}-g{self.group_size}-{str(self.dtype)[6:]}{known}"

    def rows(self, device: str | torch.device, seed: int) -> Tensor:
        padded = normal(self.m, self.k + self.gap, dtype=self.dtype, device=device, seed=seed)
        return padded[:, : self.k]

    def weight_and_scale(self, device: str | torch.device, seed: int) -> Args:
        weight = normal(self.k, dtype=self.dtype, device=device, seed=seed)
        if self.scale_dtype is None:
            return (weight,)
        return weight, known_scale(self.scale_dtype, device)

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        options = {"eps": 1e-5, "group_size": self.group_size}
        return (self.rows(device, seed), *self.weight_and_scale(device, seed + 1)), options

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return rms_norm_fp8_quantize_ref(*args, **kwargs)

    def baseline(
        self, x: Tensor, weight: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        y = hugging_face_norm(x, weight, kwargs["eps"])
        return codes_and_scales_ref(y, scale, kwargs["group_size"])

    def prepare_others(
        self, x: Tensor, weight: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        """torch's own fused norm, and the op of this library that then quantises it."""

        def unfused() -> None:
            y = torch.nn.functional.rms_norm(x, (self.k,), weight, kwargs["eps"])
            unfused_quantize(y, scale, kwargs["group_size"])

        return {"torch.rms_norm + fp8_quantize": unfused}

    def bytes(self) -> int:
        groups = 1 if self.group_size is None else -(-self.k // self.group_size)
        rows = self.m * (self.k * (self.dtype.itemsize + 1) + 4 * groups)
        return rows + self.k * self.dtype.itemsize

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        scale = "static" if self.scale_dtype is not None else str(self.group_size)
        return {"M": self.m, "K": self.k, "group_size": scale}


HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
PROBLEMS: list[tuple[Any, ...]] = [
    # Vectors and single elements, short last groups, rows that are not multiples of 4.
    *(
        (m, k, group_size, dtype)
        for group_size in (None, 128)
        for m, k in ((1, 128), (5, 576), (17, 1368), (3, 200), (8, 77), (2, 1), (9, 2112))
        for dtype in (HALF, BF16, FP32)
    ),
    *((m, k, None, d, s) for m, k, d, s in ((5, 77, HALF, BF16), (7, 2112, BF16, FP32))),
    *((m, k, None, d, s) for m, k, d, s in ((3, 128, FP32, HALF), (6, 1000, BF16, BF16))),
    # As many octets per thread as there are kernels for, and rows that are too long for any.
    *(
        (2, k, group_size, dtype)
        for k in (4096, 8200, 16392, 57344, 69640)
        for group_size in (None, 128)
        for dtype in (BF16, FP32)
    ),
    # Rows apart, at multiples of 16 bytes and off them.
    *((5, 256, group_size, BF16, None, gap) for group_size in (None, 128) for gap in (64, 3)),
    # Nothing to do, in each dimension; a row of no elements has a scale all the same.
    *((m, k, g) for m, k in ((0, 64), (4, 0)) for g in (None, 128)),
    *((m, k, None, BF16, FP32) for m, k in ((0, 64), (4, 0))),
    # More rows than two dimensions of a grid may have.
    *((65537, 8, g) for g in (None, 128)),
]
CASES = [RmsNormFp8QuantizeCase(*problem) for problem in PROBLEMS]
BENCH_PROBLEMS = [
    (m, k, group_size)
    for group_size in (None, 128)
    for k in (4096, 8192)  # of hidden states
    for m in (1, 16, 64, 256, 4096)
]
BENCH = [RmsNormFp8QuantizeCase(*problem) for problem in BENCH_PROBLEMS]
