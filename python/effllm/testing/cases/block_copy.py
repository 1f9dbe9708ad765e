"""Problems for block_copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.block_copy import block_copy_ref
from ..case import SHORT_NAMES, Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class BlockCopyCase(Case):
    """K and V of some layers, physically [NP, HKV, P, D], with scales [NP, P, HKV] for 8-bit ones;
    one copy in ``skip_every`` goes nowhere."""

    num_copies: int
    num_layers: int = 2
    num_kv_heads: int = 2
    page_size: int = 4
    head_dim: int = 16
    dtype: torch.dtype = torch.bfloat16
    skip_every: int | None = 4
    op: ClassVar[str] = "block_copy"
    baseline_name: ClassVar[str] = "torch.index_put"

    @property
    def id(self) -> str:
        skips = "" if self.skip_every is None else f"-skip{self.skip_every}"
        return (
            f"c{self.num_copies}-l{self.num_layers}-h{self.num_kv_heads}-p{self.page_size}-"
            f"d{self.head_dim}-{str(self.dtype).removeprefix('torch.')}{skips}"
        )

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        num_pages = 2 * self.num_copies + 3
        shape = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        caches = []
        for layer in range(self.num_layers):
            for side in range(2):
                data = normal(*shape, device=device, seed=2 * (seed + layer) + side)
                caches.append(data.to(self.dtype).transpose(1, 2))
            if self.dtype.itemsize == 1:
                scales = normal(*shape[:3], dtype=torch.float16, device=device, seed=seed - layer)
                caches.append(scales.transpose(1, 2))
        generator = torch.Generator().manual_seed(seed)
        pages = torch.randperm(num_pages, generator=generator)
        src, dst = pages[: self.num_copies], pages[self.num_copies : 2 * self.num_copies]
        if self.num_copies > 2:
            src[1] = src[2]  # one page may be copied to several places
        if self.skip_every is not None:
            dst[:: self.skip_every] = -1
            src[:: 2 * self.skip_every] = -(2**40)
        return (caches, src.to(device), dst.to(device)), {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return block_copy_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return block_copy_ref(*args, **kwargs)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Indexed assignment, tensor by tensor, with the indices at hand."""
        caches, src, dst = args
        copied = (src >= 0) & (dst >= 0)
        src, dst = src[copied], dst[copied]

        def assign() -> None:
            for cache in caches:
                cache[dst] = cache[src]

        return assign

    def bytes(self) -> int:
        slot_bytes = self.head_dim * self.dtype.itemsize + (2 if self.dtype.itemsize == 1 else 0)
        page_bytes = 2 * self.num_layers * self.num_kv_heads * self.page_size * slot_bytes
        skipped = 0 if self.skip_every is None else -(-self.num_copies // self.skip_every)
        return 2 * (self.num_copies - skipped) * page_bytes + 16 * self.num_copies

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {
            "copies": self.num_copies,
            "layers": self.num_layers,
            "HKV": self.num_kv_heads,
            "D": self.head_dim,
            "page": self.page_size,
            "kv_dtype": SHORT_NAMES.get(self.dtype, "8 bits"),
        }


def _cases() -> list[BlockCopyCase]:
    case = BlockCopyCase
    return [
        *(case(5, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)),
        *(case(5, dtype=dtype) for dtype in (torch.uint8, torch.int8)),
        # Pages of odd sizes, of one slot, and of more than one part per block.
        *(case(7, 1, 3, 5, dim, dtype) for dim in (1, 7) for dtype in (torch.float16, torch.uint8)),
        case(9, 3, 1, 1, 8),
        case(3, 2, 8, 64, 128),
        # All skipped; nothing to do in each dimension.
        case(6, skip_every=1),
        *(case(*shape) for shape in ((0, 2), (4, 2, 0), (4, 2, 2, 0))),
        # More caches than one launch takes.
        case(2, 210, 1, 2, 8, skip_every=None),
    ]


CASES = _cases()

# Beams of one step and of a batch, all layers of Llama-3-8B; the last is bound by bytes.
BENCH = [
    *(BlockCopyCase(copies, 32, 8, 16, 128, skip_every=None) for copies in (1, 4, 32)),
    BlockCopyCase(128, 32, 8, 16, 128, skip_every=None),
]
