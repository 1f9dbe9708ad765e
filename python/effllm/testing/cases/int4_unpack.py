"""Problems for int4_unpack: those of int4_pack, the other way round."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...ops.int4_pack import int4_pack_ref
from ...ops.int4_unpack import int4_unpack_ref
from ..case import Args, Kwargs
from .int4_pack import MODEL_SHAPES, SHAPES, Int4PackCase, random_codes


class Int4UnpackCase(Int4PackCase):
    """Words into codes [n, k]."""

    op: ClassVar[str] = "int4_unpack"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        qweight = int4_pack_ref(random_codes(self.n, self.k, "cpu", seed))
        return (qweight.to(device), self.n, self.k), {}

    def reference(self, qweight: Tensor, n: int, k: int) -> Tensor:  # type: ignore[override]
        return int4_unpack_ref(qweight, n, k)

    baseline = reference  # type: ignore[assignment]


CASES = [Int4UnpackCase(n, k) for n, k in SHAPES]
BENCH = [Int4UnpackCase(n, k) for n, k in MODEL_SHAPES]
