"""Problems for h2o_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops._kv_codes import QUANTIZED_KV
from ...ops.h2o_attention import h2o_attention_ref
from ...ops.paged_attention import cache_rows, paged_attention
from ..case import Args, Case, Kwargs
from ..hostile import poison_
from .paged_attention import PagedAttentionCase


@dataclass(frozen=True)
class H2oAttentionCase(Case):
    """A step of decoding over sequences of so many keys, with scores that are NaN behind them."""

    lengths: tuple[int, ...]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    scale: float | None = None
    sinks: bool = False
    per_head: bool = True
    """Whether each KV head has pages and a length of its own, as PagedAttentionCase has them; else
    all have one table."""
    expanded: bool = False
    """Whether that one table is given as one for each KV head."""
    kv_dtype: str | None = None
    """Of a quantised cache: a key of QUANTIZED_KV; None: the cache is in ``dtype``."""
    op: ClassVar[str] = "h2o_attention"
    baseline_name: ClassVar[str] = "torch"

    @property
    def attention(self) -> PagedAttentionCase:
        """The same without scores."""
        return PagedAttentionCase(
            tuple((1, keys) for keys in self.lengths),
            self.num_q_heads,
            self.num_kv_heads,
            self.head_dim,
            self.page_size,
            self.dtype,
            softcap=self.softcap,
            scale=self.scale,
            sinks=self.sinks,
            per_head=self.per_head,
            kv_dtype=self.kv_dtype,
        )

    @property
    def id(self) -> str:
        return self.attention.id + ("-expanded" if self.expanded else "")

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        args, options = self.attention.make(device, seed)
        q, k_cache, v_cache, page_table, seq_lens, _, *scales = args
        if self.expanded:
            heads = self.num_kv_heads
            page_table = page_table[:, None].expand(-1, heads, -1)
            seq_lens = seq_lens[:, None].expand(-1, heads).contiguous()
        slots = max(self.lengths, default=0) + 3
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.lengths), self.num_kv_heads, slots)
        scores = torch.rand(shape, generator=generator).to(device)
        used = seq_lens if seq_lens.dim() == 2 else seq_lens[:, None]
        poison_(scores, torch.arange(slots, device=device) >= used[..., None])
        kwargs: Kwargs = {"scale": self.scale, "softcap": self.softcap}
        if self.sinks:
            kwargs["sinks"] = options["sinks"]
        return (q, k_cache, v_cache, scores, page_table, seq_lens, *scales), kwargs

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return h2o_attention_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 arithmetic, weights and result rounded as ``PagedAttentionCase.baseline`` does, and
        scores on a GPU as ``AttnColsumCase.baseline`` has them."""
        scores, out, lse = h2o_attention_ref(
            *args,
            **kwargs,
            dtype=torch.float32,
            weights_dtype=self.dtype,
            tensor_cores=args[0].is_cuda,
        )
        return scores, out.to(self.dtype), lse

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """H2O as its authors' code has it: a dense cache, repeated for all query heads, and the
        whole matrix of weights."""
        if len({*self.lengths}) != 1 or self.per_head or self.softcap > 0 or self.sinks:
            return super().prepare_baseline(*args, **kwargs)
        q, k_cache, v_cache, scores, page_table, _, *scales = args
        table = page_table[:, 0] if page_table.dim() == 3 else page_table
        slot = torch.arange(self.lengths[0], device=q.device)
        pages, offsets = table[:, slot // self.page_size].long(), slot % self.page_size
        group = self.num_q_heads // self.num_kv_heads
        keys, values = (
            torch.stack([cache_rows(cache, of_cache, row, offsets, self.dtype) for row in pages])
            .transpose(1, 2)
            .repeat_interleave(group, dim=1)
            for cache, of_cache in zip((k_cache, v_cache), scales or (None, None), strict=True)
        )
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        used = scores[..., : self.lengths[0]]

        def attend() -> Tensor:
            products = q[:, :, None] @ keys.transpose(2, 3) * scale
            weights = products.softmax(-1, dtype=torch.float32)
            used.add_(weights.view(*scores.shape[:2], group, -1).sum(2))
            return weights.to(self.dtype) @ values

        return attend

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """Attention over the same slots without scores: what they cost is the difference."""
        q, k_cache, v_cache, _, page_table, seq_lens, *scales = args
        starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        rest = (page_table, seq_lens, starts, *scales)
        return {
            "paged_attention": lambda: paged_attention(
                q, k_cache, v_cache, *rest, max_seqlen_q=1, **kwargs
            )
        }

    def bytes(self) -> int:
        attention = self.attention
        keys = sum(sum(attention.lengths(keys)) for keys in self.lengths)
        return attention.bytes() + 8 * keys

    def flops(self) -> int:
        return self.attention.flops()

    def shape(self) -> dict[str, int | str]:
        return self.attention.shape()


# No key, one, both sides of the borders of pages, tiles and pieces.
MIXED = (70, 1, 48, 0, 17, 100)
LONG = (1500, 3, 0, 700)


def _cases() -> list[H2oAttentionCase]:
    half, bf16 = torch.float16, torch.bfloat16
    case = H2oAttentionCase
    cases = [
        case(MIXED),
        # Groups: query heads per KV head, with more than a tile of rows among them.
        *(case(MIXED, group * 2, 2, 64, 16, half) for group in (1, 3, 5, 8, 16, 40)),
        # Head dims, page sizes.
        *(case(MIXED, 4, 2, dim) for dim in (8, 40, 80, 96, 128, 192, 256)),
        *(case(MIXED, 6, 3, 64, page_size, half) for page_size in (1, 3, 64, 256)),
        # One table for all heads, or the same one for each.
        case(MIXED, per_head=False),
        case(LONG, 8, 4, 128, per_head=False, expanded=True),
        # Scores.
        case(MIXED, dtype=half, softcap=5.0),
        case(MIXED, scale=-0.125, sinks=True),
        case(LONG, 8, 2, 128, 16, softcap=2.0, sinks=True),
        # Many keys, several pieces and CTAs; a batch of many pairs.
        case(LONG, 32, 8, 128, 16),
        case((5000, 1), 4, 1, 128, 64, half),
        case(LONG, 4, 4, 256, 1),
        case(tuple(range(40)), 16, 8, 128, 16),
        # Nothing to do.
        case(()),
        case((0, 0)),
    ]
    quantized = [
        case(MIXED, 8, 2, 128, 16, bf16),
        case(MIXED, 4, 2, 80, 1, half),
        case(LONG, 8, 2, 64, 16, bf16, sinks=True),
        case(LONG, 8, 1, 256, 64, half, per_head=False),
    ]
    return cases + [replace(each, kv_dtype=name) for name in QUANTIZED_KV for each in quantized]


CASES = _cases()
CPU_CASES = [
    H2oAttentionCase(LONG, 6, 2, 64, 16, torch.float32, sinks=True),
    H2oAttentionCase(MIXED, 10, 2, 40, 3, torch.float32, softcap=3.0),
    H2oAttentionCase(MIXED, 80, 2, 64, 16, torch.float32, per_head=False),
]

# Llama-3-8B with a budget of 1,024 and of 4,096 slots.
BENCH = [
    H2oAttentionCase((slots,) * batch, 32, 8, 128, 64, per_head=False, expanded=True, kv_dtype=name)
    for name in (None, *QUANTIZED_KV)
    for batch, slots in ((1, 1024), (1, 4096), (8, 1024), (8, 4096), (64, 1024), (64, 4096))
    if name is None or slots == 4096
]
