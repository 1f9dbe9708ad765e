"""Problems for silu_mul_fp8_quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.fp8_quantize import fp8_quantize
from ...ops.fp8_quantize_tensor import fp8_quantize_tensor
from ...ops.silu_mul_fp8_quantize import codes_and_scales_ref, silu_mul_fp8_quantize_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal


def known_scale(dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Small enough that outliers saturate."""
    return torch.tensor([0.0123], dtype=dtype, device=device)


def unfused_quantize(y: Tensor, scale: Tensor | None, group_size: int | None) -> None:
    """What an op that fuses quantising saves a call of."""
    if scale is not None:
        fp8_quantize_tensor(y, scale)
    else:
        fp8_quantize(y, group_size=group_size)


@dataclass(frozen=True)
class SiluMulFp8QuantizeCase(Case):
    """gate and up [m, k], halves of one tensor, in groups of ``group_size``, None: one scale per
    row; or with a known scale of ``scale_dtype``."""

    m: int
    k: int
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype | None = None
    op: ClassVar[str] = "silu_mul_fp8_quantize"

    @property
    def id(self) -> str:
        known = "" if self.scale_dtype is None else f"-static-{str(self.scale_dtype)[6:]}"
        return f"m{self.m}-k{self.k}-g{self.group_size}-{str(self.dtype)[6:]}{known}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        gate_up = normal(self.m, 2 * self.k, dtype=self.dtype, device=device, seed=seed)
        args: Args = tuple(gate_up.chunk(2, dim=-1))
        if self.scale_dtype is not None:
            args += (known_scale(self.scale_dtype, device),)
        return args, {"group_size": self.group_size}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return silu_mul_fp8_quantize_ref(*args, **kwargs)

    def baseline(
        self, gate: Tensor, up: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return codes_and_scales_ref(
            torch.nn.functional.silu(gate) * up, scale, kwargs["group_size"]
        )

    def prepare_others(
        self, gate: Tensor, up: Tensor, scale: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Callable[[], Any]]:
        """torch for the product, the op of this library that then quantises it."""

        def unfused() -> None:
            unfused_quantize(torch.nn.functional.silu(gate) * up, scale, kwargs["group_size"])

        return {"torch + fp8_quantize": unfused}

    def bytes(self) -> int:
        groups = 1 if self.group_size is None else -(-self.k // self.group_size)
        return self.m * (self.k * (2 * self.dtype.itemsize + 1) + 4 * groups)

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        scale = "static" if self.scale_dtype is not None else str(self.group_size)
        return {"M": self.m, "K": self.k, "group_size": scale}


_HALF, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
GROUPS = (None, 128)
CASES = [
    # Vectors and single elements, short last groups, rows that are not multiples of 4.
    *(
        SiluMulFp8QuantizeCase(m, k, group_size, dtype)
        for group_size in GROUPS
        for m, k in ((1, 128), (5, 576), (17, 1368), (3, 200), (8, 77), (2, 1), (9, 2112))
        for dtype in (_HALF, _BF16, _FP32)
    ),
    *(
        SiluMulFp8QuantizeCase(m, k, None, dtype, scale_dtype)
        for m, k in ((5, 77), (7, 2112), (3, 128))
        for dtype in (_HALF, _BF16, _FP32)
        for scale_dtype in (_HALF, _BF16, _FP32)
    ),
    # As many octets per thread as there are kernels for, and rows that are too long for any.
    *(
        SiluMulFp8QuantizeCase(2, k, group_size, dtype)
        for k in (8200, 28672, 57344, 69640)
        for group_size in GROUPS
        for dtype in (_BF16, _FP32)
    ),
    # Nothing to do, in each dimension; a row of no elements has a scale all the same.
    *(SiluMulFp8QuantizeCase(m, k, g) for m, k in ((0, 64), (4, 0)) for g in GROUPS),
    *(SiluMulFp8QuantizeCase(m, k, scale_dtype=_FP32) for m, k in ((0, 64), (4, 0))),
    # More rows than two dimensions of a grid may have.
    *(SiluMulFp8QuantizeCase(65537, 8, g) for g in GROUPS),
]
BENCH = [
    SiluMulFp8QuantizeCase(m, k, group_size)
    for group_size in GROUPS
    for k in (14336, 28672)  # of MLPs
    for m in (1, 16, 64, 256, 4096)
]
