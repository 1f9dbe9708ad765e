"""Problems for attn_colsum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops._kv_codes import QUANTIZED_KV
from ...ops.attn_colsum import attn_colsum_ref
from ...ops.paged_attention import cache_rows, paged_attention
from ..case import Args, Case, Kwargs
from .paged_attention import PagedAttentionCase


@dataclass(frozen=True)
class AttnColsumCase(Case):
    """Sequences given as pairs (query tokens, keys), after paged_attention has given their lse."""

    sequences: tuple[tuple[int, int], ...]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    last_n: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    padding: int = 0
    """Query tokens past the last sequence."""
    sinks: bool = False
    per_head: bool = False
    """Whether each KV head has pages and a length of its own, as PagedAttentionCase has them."""
    kv_dtype: str | None = None
    """Of a quantised cache: a key of QUANTIZED_KV; None: the cache is in ``dtype``."""
    op: ClassVar[str] = "attn_colsum"
    baseline_name: ClassVar[str] = "torch"

    @property
    def attention(self) -> PagedAttentionCase:
        """The attention that the sums are of."""
        return PagedAttentionCase(
            self.sequences,
            self.num_q_heads,
            self.num_kv_heads,
            self.head_dim,
            self.page_size,
            self.dtype,
            softcap=self.softcap,
            scale=self.scale,
            padding=self.padding,
            sinks=self.sinks,
            per_head=self.per_head,
            kv_dtype=self.kv_dtype,
        )

    @property
    def id(self) -> str:
        return self.attention.id + (f"-last{self.last_n}" if self.last_n is not None else "")

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        args, options = self.attention.make(device, seed)
        _, lse = paged_attention(*args, **options)
        q, k_cache, _, page_table, seq_lens, cu_seqlens_q, *scales = args
        kwargs: Kwargs = {
            "max_seqlen_k": max((keys for _, keys in self.sequences), default=0) + 3,
            "last_n": self.last_n,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        if self.sinks:
            kwargs["sinks"] = options["sinks"]
        return (q, k_cache, page_table, seq_lens, cu_seqlens_q, lse, *scales[:1]), kwargs

    def reference(self, *args: Any, **kwargs: Any) -> Tensor:
        return attn_colsum_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> Tensor:
        """On a GPU with its tensor cores, as the op has them: they cut off what does not fit into
        their sums, where other arithmetic rounds, so that scores, and with them the exponents of
        the weights, are off by more than fp32 is."""
        return attn_colsum_ref(*args, **kwargs, dtype=torch.float32, tensor_cores=args[0].is_cuda)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """What eager attention with its weights kept would do, over keys that lie dense: some
        queries at a time, as all weights of a long prompt would not fit."""
        if len(self.sequences) != 1 or self.per_head or self.softcap > 0 or self.sinks:
            return super().prepare_baseline(*args, **kwargs)
        q, k_cache, page_table, _, _, _, *scales = args
        queries, num_keys = self.sequences[0]
        slot = torch.arange(num_keys, device=q.device)
        pages = page_table[0, slot // self.page_size].long()
        group = self.num_q_heads // self.num_kv_heads
        of_cache = scales[0] if scales else None
        keys = cache_rows(k_cache, of_cache, pages, slot % self.page_size, self.dtype)
        keys = keys.transpose(0, 1).repeat_interleave(group, dim=0).transpose(1, 2)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        first = 0 if self.last_n is None else max(queries - self.last_n, 0)

        def sum_weights() -> Tensor:
            sums = torch.zeros(self.num_kv_heads, num_keys, device=q.device)
            for begin in range(first, queries, 1024):
                rows = q[begin : min(begin + 1024, queries)].transpose(0, 1)
                position = num_keys - queries + begin + torch.arange(rows.shape[1], device=q.device)
                products = (rows @ keys * scale).masked_fill(slot > position[:, None], -torch.inf)
                weights = products.softmax(-1, dtype=torch.float32)
                sums += weights.unflatten(0, (-1, group)).sum((1, 2))
            return sums

        return sum_weights

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """The attention itself, beside which the sums are to be cheap."""
        whole, options = self.attention.make(args[0].device)
        return {"paged_attention": lambda: paged_attention(*whole, **options)}

    @property
    def counted(self) -> PagedAttentionCase:
        """Attention of the queries that count alone."""
        sequences = tuple(
            (queries if self.last_n is None else min(queries, self.last_n), keys)
            for queries, keys in self.sequences
        )
        return replace(self.attention, sequences=sequences)

    def bytes(self) -> int:
        counted = self.counted
        row = self.head_dim * self.dtype.itemsize
        if self.kv_dtype:
            row = self.head_dim * (4 if self.kv_dtype == "int4" else 8) // 8 + 4
        keys = sum(sum(counted.lengths(keys)) for queries, keys in self.sequences if queries)
        tokens = sum(queries for queries, _ in counted.sequences)
        of_queries = tokens * self.num_q_heads * (self.head_dim * self.dtype.itemsize + 4)
        return keys * (row + 4) + of_queries

    def flops(self) -> int:
        return self.counted.flops() // 2

    def shape(self) -> dict[str, int | str]:
        last_n = {} if self.last_n is None else {"last_n": self.last_n}
        return self.attention.shape() | last_n


# A prompt from nothing and onto a prefix, a step of decoding, no keys, no queries, more queries
# than keys, and lengths on both sides of the borders of tiles.
MIXED = ((5, 5), (1, 1), (1, 48), (3, 70), (0, 9), (1, 0), (6, 2), (40, 100), (65, 129))


def _cases() -> list[AttnColsumCase]:
    half, bf16 = torch.float16, torch.bfloat16
    case = AttnColsumCase
    cases = [
        case(MIXED),
        *(case(MIXED, group * 2, 2, 64, 16, half) for group in (1, 3, 5, 16)),
        case(((3, 33), (20, 20)), 71, 1, 64),
        *(case(MIXED, 4, 2, dim) for dim in (8, 40, 80, 96, 128, 192, 256)),
        *(case(MIXED, 6, 2, 64, page_size, half) for page_size in (1, 3, 64, 256)),
        *(case(MIXED, last_n=last_n) for last_n in (1, 4, 32, 1000)),
        case(MIXED, dtype=half, softcap=5.0, padding=2),
        case(MIXED, scale=-0.125, sinks=True),
        case(MIXED, per_head=True),
        case(MIXED, 6, 3, 128, 3, half, per_head=True, sinks=True, last_n=7),
        # Many keys, many queries.
        case(((700, 700), (300, 900)), 4, 1, 128, 16),
        case(((130, 1500),), 8, 2, 128, 64, half, last_n=100),
        case(((300, 300),), 2, 2, 256, 16),
        # Nothing to do.
        case(()),
        case((), padding=3),
        case(((0, 0), (0, 7), (2, 0))),
    ]
    quantized = [
        case(MIXED, 8, 2, 128, 16, bf16),
        case(MIXED, 4, 2, 80, 1, half, last_n=5),
        case(((150, 150), (70, 300)), 4, 1, 64, 16, bf16, sinks=True),
        case(((130, 200),), 4, 4, 256, 16, half),
    ]
    return cases + [replace(each, kv_dtype=name) for name in QUANTIZED_KV for each in quantized]


CASES = _cases()
CPU_CASES = [
    AttnColsumCase(MIXED, 6, 2, 64, 16, torch.float32, sinks=True),
    AttnColsumCase(MIXED, 10, 2, 40, 3, torch.float32, softcap=3.0, last_n=9),
    AttnColsumCase(((600, 700),), 4, 2, 128, 16, torch.float32, per_head=True),
]

# Prompts of Llama-3-8B: all queries (H2O), and the last 64 (SnapKV).
BENCH = [
    AttnColsumCase(((keys, keys),), 32, 8, 128, 64, last_n=last_n)
    for last_n in (None, 64)
    for keys in (2048, 8192, 16384)
]
