"""Problems for kv_compact."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.kv_compact import kv_compact_ref
from ..case import SHORT_NAMES, Args, Case, Kwargs
from ..hostile import normal


@dataclass(frozen=True)
class KvCompactCase(Case):
    """K and V of some layers, physically [NP, HKV, P, D], with scales [NP, P, HKV] for 8-bit ones.
    Entries of tables and paths that must not be read are far out of range."""

    num_trees: int
    num_nodes: int
    num_layers: int = 2
    num_kv_heads: int = 2
    page_size: int = 4
    head_dim: int = 16
    dtype: torch.dtype = torch.bfloat16
    accepted: int | None = None
    """Nodes on each path; else chance decides, and some trees have none."""
    per_head: bool = False
    op: ClassVar[str] = "kv_compact"
    baseline_name: ClassVar[str] = "torch.index_put"

    @property
    def id(self) -> str:
        per_head = "-per-head" * self.per_head
        return (
            f"b{self.num_trees}-n{self.num_nodes}-l{self.num_layers}-h{self.num_kv_heads}-"
            f"p{self.page_size}-d{self.head_dim}-"
            f"{str(self.dtype).removeprefix('torch.')}{per_head}"
        )

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        rng = random.Random(seed)
        heads = self.num_kv_heads if self.per_head else 1
        max_pages = -(-(3 * self.page_size + self.num_nodes) // self.page_size)
        num_tables = self.num_trees * heads
        num_pages = num_tables * max_pages + 1
        pages = 1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(seed))
        page_table = pages.int().view(self.num_trees, heads, max_pages)
        prefixes = torch.tensor(
            [rng.randrange(3 * self.page_size) for _ in range(num_tables)], dtype=torch.int32
        ).view(self.num_trees, heads)
        used = -(-(prefixes[..., None] + self.num_nodes) // self.page_size)
        page_table = page_table.where(torch.arange(max_pages) < used, 2**31 - 1)
        if not self.per_head:
            page_table, prefixes = page_table[:, 0], prefixes[:, 0]

        counts = [rng.randint(0, self.num_nodes) for _ in range(self.num_trees)]
        if self.accepted is not None:
            counts = [self.accepted] * self.num_trees
        accept_index = torch.full((self.num_trees, self.num_nodes), -(2**31), dtype=torch.int32)
        for tree, count in enumerate(counts):
            path = sorted(rng.sample(range(1, self.num_nodes), max(count - 1, 0)))
            accept_index[tree, :count] = torch.tensor([0, *path][:count], dtype=torch.int32)

        shape = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        caches = []
        for layer in range(self.num_layers):
            for side in range(2):
                data = normal(*shape, device=device, seed=2 * (seed + layer) + side)
                caches.append(data.to(self.dtype).transpose(1, 2))
            if self.dtype.itemsize == 1:
                scales = normal(*shape[:3], dtype=torch.float32, device=device, seed=seed - layer)
                caches.append(scales.transpose(1, 2))
        others = (page_table, prefixes, accept_index, torch.tensor(counts, dtype=torch.int32))
        return (caches, *(tensor.contiguous().to(device) for tensor in others)), {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return kv_compact_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return kv_compact_ref(*args, **kwargs)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Indexed assignment, tensor by tensor, with the places at hand."""
        caches, page_table, prefix_lens, accept_index, num_accepted = args
        sources: list[tuple[int, int]] = []
        targets: list[tuple[int, int]] = []
        for tree, count in enumerate(num_accepted.tolist()):
            first = int(prefix_lens[tree])
            for place, node in enumerate(accept_index[tree, :count].tolist()):
                if node != place:
                    for positions, position in ((sources, first + node), (targets, first + place)):
                        page = int(page_table[tree, position // self.page_size])
                        positions.append((page, position % self.page_size))
        source = torch.tensor(sources, device=page_table.device).view(-1, 2).unbind(1)
        target = torch.tensor(targets, device=page_table.device).view(-1, 2).unbind(1)

        def assign() -> None:
            for cache in caches:
                cache[target] = cache[source]

        return assign

    def bytes(self) -> int:
        row_bytes = self.head_dim * self.dtype.itemsize + (2 if self.dtype.itemsize == 1 else 0)
        moved = self.num_trees * ((self.accepted or 1) - 1)
        return 2 * moved * 2 * self.num_layers * self.num_kv_heads * row_bytes

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {
            "B": self.num_trees,
            "W": self.num_nodes,
            "accepted": self.accepted or 0,
            "layers": self.num_layers,
            "HKV": self.num_kv_heads,
            "D": self.head_dim,
            "page": self.page_size,
            "kv_dtype": SHORT_NAMES.get(self.dtype, "8 bits"),
        }


def _cases() -> list[KvCompactCase]:
    case = KvCompactCase
    return [
        *(case(5, 9, dtype=dtype, per_head=per_head)
          for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.int8)
          for per_head in (False, True)),
        # Rows of odd sizes, pages of one slot, paths that a thread does not hold at once.
        *(case(3, 7, 1, 3, 5, dim, dtype)
          for dim in (1, 7) for dtype in (torch.float16, torch.uint8)),
        case(4, 6, 3, 1, 1, 8),
        case(2, 40, 1, 2, 16, 64, accepted=40),
        case(2, 64, 1, 2, 16, 64, accepted=30, per_head=True),
        # More words than a block has threads.
        case(2, 8, 1, 8, 4, 576),
        # Roots alone; nothing to do in each dimension.
        case(3, 1),
        *(case(*shape) for shape in ((0, 4), (3, 4, 0), (3, 4, 2, 0), (3, 4, 2, 2, 4, 0))),
        # More caches than one launch takes.
        case(2, 4, 210, 1, 2, 8),
    ]  # fmt: skip


CASES = _cases()

# All layers of Llama-3-8B, four of a tree's nodes accepted.
BENCH = [
    KvCompactCase(trees, 16, 32, 8, 16, 128, dtype, accepted=4)
    for trees in (1, 16, 64)
    for dtype in (torch.bfloat16, torch.uint8)
]
