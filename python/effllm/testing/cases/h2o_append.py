"""Problems for h2o_append."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops._kv_codes import QUANTIZED_KV, as_bits, codes_per_row, empty_kv_scale, quantize_kv
from ...ops.h2o_append import h2o_append_ref
from ..case import SHORT_NAMES, Args, Case, Kwargs
from ..hostile import absurd_tails, normal, poison_


@dataclass(frozen=True)
class H2oAppendCase(Case):
    """A token for each sequence, of which KV head h uses ``used[b]`` - h slots: of a cache full of
    NaN, with scores of few different values."""

    used: tuple[int, ...]
    budget: int | None = None
    """None: as many slots as there are scores, which is two more than are used."""
    recent: int = 4
    n_sink: int = 0
    normalize: bool = False
    num_kv_heads: int = 3
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    skip_every: int | None = None
    """Of so many sequences one has no new token."""
    kv_dtype: str | None = None
    """Of a quantised cache: a key of QUANTIZED_KV; None: the cache is in ``dtype``."""
    shared: bool = False
    """Whether the heads of a sequence have the same pages."""
    op: ClassVar[str] = "h2o_append"
    baseline_name: ClassVar[str] = "torch"

    @property
    def id(self) -> str:
        used = "+".join(map(str, self.used))
        if len(set(self.used)) == 1:
            used = f"b{len(self.used)}-n{self.used[0]}"
        options = {
            "normalize": self.normalize,
            f"skip{self.skip_every}": self.skip_every is not None,
            f"{self.kv_dtype}": self.kv_dtype is not None,
            "shared": self.shared,
        }
        names = [name for name, chosen in options.items() if chosen]
        numbers = f"c{self.budget}-r{self.recent}-f{self.n_sink}"
        heads = f"h{self.num_kv_heads}-d{self.head_dim}-p{self.page_size}"
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([used or "b0", numbers, heads, dtype, *names])

    def lengths(self) -> list[list[int]]:
        """Slots that heads use."""
        return [[max(used - head, 0) for head in range(self.num_kv_heads)] for used in self.used]

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        batch, heads = len(self.used), self.num_kv_heads
        generator = torch.Generator().manual_seed(seed)
        k, v = (
            normal(batch, heads, self.head_dim, dtype=self.dtype, device=device, seed=seed + i)
            for i in (1, 2)
        )
        seq_lens = torch.tensor(self.lengths(), dtype=torch.int32).view(batch, heads)
        slots = max(self.used, default=0) + 2
        # Positions of texts half as long again, the last tokens always among them.
        positions = torch.tensor(self.used).long() * 3 // 2 + 1
        slot_pos = poison_(torch.empty(batch, heads, slots, dtype=torch.int32))
        for row, of_seq in enumerate(seq_lens.tolist()):
            for head, used in enumerate(of_seq):
                seen = int(positions[row])
                order = torch.randperm(seen, generator=generator)
                slot_pos[row, head, :used] = order[:used].to(torch.int32)
        scores = torch.randint(6, (batch, heads, slots), generator=generator) / 4
        poison_(scores, torch.arange(slots) >= seq_lens[..., None])
        if self.skip_every is not None:
            positions[:: self.skip_every] = -1

        pages_of = -(-(seq_lens + 1) // self.page_size)
        if self.shared:
            pages_of = pages_of[:, :1].expand_as(pages_of)
        longest = max(int(pages_of.max()) if pages_of.numel() else 0, -(-slots // self.page_size))
        table_heads = 1 if self.shared else heads
        num_pages = int(pages_of[:, :table_heads].sum()) + 2
        pages = torch.randperm(num_pages, generator=generator).to(torch.int32)
        page_table = torch.zeros(batch, table_heads, longest, dtype=torch.int32)
        counts = pages_of[:, :table_heads].flatten().tolist()
        for row, count in zip(page_table.flatten(0, 1), counts, strict=True):
            row[:count], pages = pages[:count], pages[count:]
        page_table = page_table.expand(-1, heads, -1)
        page_table = absurd_tails(page_table, pages_of * self.page_size, self.page_size)

        cache_dtype = QUANTIZED_KV[self.kv_dtype] if self.kv_dtype else self.dtype
        row_size = codes_per_row(self.head_dim, cache_dtype)
        shape = (num_pages, heads, self.page_size, row_size)
        caches = [
            poison_(torch.empty(shape, dtype=cache_dtype, device=device)).transpose(1, 2)
            for _ in range(2)
        ]
        scales = [
            poison_(empty_kv_scale(num_pages, heads, self.page_size, cache_dtype, device))
            for _ in range(2 if self.kv_dtype else 0)
        ]
        state = (scores, slot_pos, seq_lens, page_table, positions)
        kwargs: Kwargs = {
            "budget": self.budget,
            "recent": self.recent,
            "n_sink": self.n_sink,
            "normalize": self.normalize,
        }
        return (k, v, *caches, *(tensor.to(device) for tensor in state), *scales), kwargs

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return h2o_append_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return h2o_append_ref(*args, **kwargs)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """All heads at once, without the ties."""
        k, v, k_cache, v_cache, scores, slot_pos, seq_lens, page_table, positions, *scales = args
        head = torch.arange(self.num_kv_heads, device=k.device)
        budget = scores.shape[2] if self.budget is None else self.budget
        slots = torch.arange(scores.shape[2], device=k.device)

        def append() -> None:
            attention = scores
            if self.normalize:
                attention = scores / (positions[:, None, None] - slot_pos).clamp(min=1)
            stays = (slot_pos < self.n_sink) | (slot_pos > positions[:, None, None] - self.recent)
            stays |= slots >= seq_lens[..., None]
            lowest = attention.masked_fill(stays, torch.inf).argmin(-1)
            slot = torch.where(seq_lens < budget, seq_lens.long(), lowest)[..., None]
            page = page_table.gather(2, slot // self.page_size)[..., 0].long()
            offset = slot[..., 0] % self.page_size
            for index, (rows, cache) in enumerate(((k, k_cache), (v, v_cache))):
                if scales:
                    rows, scales[index][page, offset, head] = quantize_kv(rows, cache.dtype)
                as_bits(cache)[page, offset, head] = as_bits(rows)
            scores.scatter_(2, slot, 0.0)
            slot_pos.scatter_(2, slot, positions[:, None, None].int().expand_as(slot))
            seq_lens.copy_(torch.maximum(seq_lens, (seq_lens + 1).clamp(max=budget)))

        return append

    def bytes(self) -> int:
        lengths = [n for of_seq in self.lengths() for n in of_seq]
        budget = max(self.used, default=0) + 2 if self.budget is None else self.budget
        searched = sum(n for n in lengths if n >= budget)
        written = read = self.head_dim * self.dtype.itemsize
        if self.kv_dtype:
            written = codes_per_row(self.head_dim, QUANTIZED_KV[self.kv_dtype]) + 4
        return 8 * searched + len(lengths) * (2 * (read + written) + 16)

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {
            "B": len(self.used),
            "S": max(self.used, default=0),
            "HKV": self.num_kv_heads,
            "D": self.head_dim,
            "page": self.page_size,
            "kv_dtype": self.kv_dtype or SHORT_NAMES[self.dtype],
        }


# Empty, one, below, at and above a budget of 40.
MIXED = (0, 1, 17, 38, 39, 40, 41, 42, 70)


def _cases() -> list[H2oAppendCase]:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    case = H2oAppendCase
    return [
        *(case(MIXED, 40, dtype=dtype) for dtype in (bf16, half, fp32)),
        case(MIXED),
        case(MIXED, 40, 10, 4),
        case(MIXED, 40, 10, 4, normalize=True),
        # Nothing protected; all of it, by either rule; a budget of one slot and of one page.
        case(MIXED, 40, 0),
        case(MIXED, 40, 1000),
        case(MIXED, 40, 1000, 39),
        case((1, 2, 5), 1, 1),
        case((15, 16, 17), 16, 4, 2),
        # Head dims that 16-byte accesses do not fit, page sizes, heads.
        *(case(MIXED, 40, num_kv_heads=2, head_dim=dim) for dim in (1, 7, 40, 128, 256)),
        *(case(MIXED, 40, page_size=page_size) for page_size in (1, 3, 64)),
        case(MIXED, 40, num_kv_heads=1, skip_every=2),
        case(MIXED, 40, 10, 4, True, 8, 128, 16, half, skip_every=1),
        case(MIXED, 40, 10, 4, shared=True, num_kv_heads=4),
        # Long ones; many sequences.
        case((4096, 4095, 3000, 5000), 4096, 256, 4, num_kv_heads=2),
        case((4096, 4097, 1), 4096, 1, normalize=True, num_kv_heads=1, head_dim=128),
        case(tuple(range(90)), 33, 5, 3),
        case(()),
        case((3, 4), num_kv_heads=0),
        *(
            case(MIXED, 40, 10, 4, True, 3, dim, 16, dtype, kv_dtype=kv_dtype)
            for kv_dtype in QUANTIZED_KV
            for dim, dtype in ((128, bf16), (80, half), (6, fp32))
        ),
    ]


CASES = _cases()


def _bench() -> list[H2oAppendCase]:
    full = [
        H2oAppendCase((slots + 7,) * batch, slots, slots // 2, 4, False, 8, 128, 64)
        for batch, slots in ((1, 4096), (8, 4096), (64, 1024), (64, 4096))
    ]
    growing = H2oAppendCase((2000,) * 64, None, 1000, 4, False, 8, 128, 64)
    normalized = replace(full[-1], normalize=True)
    return [*full, growing, normalized, *(replace(full[-1], kv_dtype=n) for n in QUANTIZED_KV)]


# Llama-3-8B: all heads evict, then none.
BENCH = _bench()
