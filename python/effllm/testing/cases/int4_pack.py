"""Problems for int4_pack and int4_unpack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ops.int4_pack import int4_pack_ref
from ..case import Args, Case, Kwargs


def random_codes(n: int, k: int, device: str | torch.device, seed: int) -> Tensor:
    """Codes uint8 [n, k], uniform in 0..15."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8).to(device)


@dataclass(frozen=True)
class Int4PackCase(Case):
    """Codes [n, k] into words."""

    n: int
    k: int
    op: ClassVar[str] = "int4_pack"

    @property
    def id(self) -> str:
        return f"n{self.n}-k{self.k}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        return (random_codes(self.n, self.k, device, seed),), {}

    def reference(self, codes: Tensor) -> Tensor:
        return int4_pack_ref(codes)

    baseline = reference

    def bytes(self) -> int:
        return self.n * self.k + 2048 * (-(-self.n // 64)) * (-(-self.k // 64))

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "K": self.k}


# Whole tiles, every kind of tail (N % 8 and K % 8 too), single elements and nothing at all.
SHAPES = [(64, 64), (128, 192), (1, 1), (8, 16), (17, 40), (65, 129), (100, 1000), (0, 64), (64, 0)]
MODEL_SHAPES = [(4096, 4096), (28672, 4096)]

CASES = [Int4PackCase(n, k) for n, k in SHAPES]
BENCH = [Int4PackCase(n, k) for n, k in MODEL_SHAPES]
