"""Problems for paged_attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ...ops._kv_codes import QUANTIZED_KV, as_bits, codes_per_row, quantize_kv
from ...ops.paged_attention import paged_attention_ref
from ..case import SHORT_NAMES, Args, Case, Kwargs
from ..hostile import absurd_tails, normal, poison_unused_slots_
from ..sdpa import prepare_sdpa

SPARE_PAGES = 3
"""Pages of the cache that no sequence owns."""
MAX_DISTINCT = 2**24
"""Elements of a cache that differ; larger ones repeat them. Random numbers take a CPU long."""


def paged_cache(
    num_pages: int,
    page_size: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int,
    kv_dtype: str | None = None,
) -> list[Tensor]:
    """Values of a cache, logical [NP, P, HKV, D], in memory [NP, HKV, P, D]; if it is quantised,
    its scales too."""
    distinct = min(num_pages, max(1, MAX_DISTINCT // (heads * page_size * dim)))
    pages = normal(distinct, heads, page_size, dim, dtype=dtype, seed=seed)
    tensors = quantize_kv(pages, QUANTIZED_KV[kv_dtype]) if kv_dtype else (pages,)
    order = torch.arange(num_pages) % distinct
    return [as_bits(t)[order].view(t.dtype).transpose(1, 2) for t in tensors]


def tree_words(num_nodes: int, generator: torch.Generator) -> Tensor:
    """The words of a random tree, int64 [num_nodes], with bits of no meaning behind each node's."""
    words, stray = [1] * num_nodes, torch.randint(2, (max(num_nodes, 1), 64), generator=generator)
    for node in range(1, num_nodes):
        parent = int(torch.randint(max(node - 4, 0), node, (1,), generator=generator))
        words[node] = words[parent] | 1 << node
    for node, bits in enumerate(stray[:num_nodes].tolist()):
        words[node] |= sum(bit << i for i, bit in enumerate(bits) if i > node)
    return torch.tensor([word - (word >> 63 << 64) for word in words], dtype=torch.int64)


@dataclass(frozen=True)
class PagedAttentionCase(Case):
    """Sequences given as pairs (query tokens, keys), over a cache whose unused slots hold NaN and
    under a table whose tails hold no pages."""

    sequences: tuple[tuple[int, int], ...]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    padding: int = 0
    """Query tokens past the last sequence."""
    sinks: bool = False
    alibi: bool = False
    per_head: bool = False
    """Whether each KV head has pages and a length of its own: the first has all of a sequence's
    keys, later ones fewer, and of a single key none."""
    split_size: int | None = None
    sink_tokens: int = 0
    kv_dtype: str | None = None
    """Of a quantised cache: a key of QUANTIZED_KV; None: the cache is in ``dtype``."""
    tree: bool = False
    """Whether the query tokens of every sequence are a tree, of every third a chain."""
    op: ClassVar[str] = "paged_attention"
    baseline_name: ClassVar[str] = "torch.sdpa"

    @property
    def id(self) -> str:
        if len(set(self.sequences)) == 1:
            lengths = f"b{len(self.sequences)}-q{self.sequences[0][0]}-s{self.sequences[0][1]}"
        else:
            lengths = "+".join(f"{queries}of{keys}" for queries, keys in self.sequences) or "b0"
        options = {
            "full": not self.causal,
            f"window{self.window}": self.window is not None,
            f"softcap{self.softcap:g}": self.softcap > 0,
            f"scale{self.scale}": self.scale is not None,
            f"pad{self.padding}": self.padding > 0,
            "sinks": self.sinks,
            "alibi": self.alibi,
            "per_head": self.per_head,
            f"split{self.split_size}": self.split_size is not None,
            f"first{self.sink_tokens}": self.sink_tokens > 0,
            f"{self.kv_dtype}": self.kv_dtype is not None,
            "tree": self.tree,
        }
        names = [name for name, used in options.items() if used]
        heads = f"h{self.num_q_heads}.{self.num_kv_heads}-d{self.head_dim}-p{self.page_size}"
        return "-".join([lengths, heads, str(self.dtype).removeprefix("torch."), *names])

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        lengths = [self.lengths(keys) if self.per_head else keys for _, keys in self.sequences]
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        if self.per_head:
            seq_lens = seq_lens.view(-1, self.num_kv_heads)
        starts = [0]
        for queries, _ in self.sequences:
            starts.append(starts[-1] + queries)
        pages_of = -(-seq_lens // self.page_size)
        num_pages = int(pages_of.sum()) + SPARE_PAGES
        generator = torch.Generator().manual_seed(seed)
        free = torch.randperm(num_pages, generator=generator).tolist()
        longest = int(pages_of.max()) if pages_of.numel() else 0
        page_table = torch.zeros(*seq_lens.shape, longest + 2, dtype=torch.int32)
        for row, count in zip(page_table.flatten(0, -2), pages_of.flatten().tolist(), strict=True):
            row[:count] = torch.tensor([free.pop() for _ in range(count)])
        shape = (num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        (k_cache, *k_scale), (v_cache, *v_scale) = (
            [
                poison_unused_slots_(tensor.to(device), page_table, seq_lens)
                for tensor in paged_cache(*shape, self.dtype, seed + i, self.kv_dtype)
            ]
            for i in (1, 2)
        )
        q = normal(
            starts[-1] + self.padding,
            self.num_q_heads,
            self.head_dim,
            dtype=self.dtype,
            device=device,
            seed=seed + 3,
        )
        kwargs: Kwargs = {
            "max_seqlen_q": max((queries for queries, _ in self.sequences), default=0),
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "split_size": self.split_size,
            "sink_tokens": self.sink_tokens,
        }
        if self.sinks:  # from none to one that takes all
            kwargs["sinks"] = torch.linspace(-3.0, 9.0, self.num_q_heads, device=device)
            kwargs["sinks"][0] = -math.inf
        if self.alibi:  # the slopes of the paper: a geometric sequence down to 2^-8
            heads = torch.arange(1, self.num_q_heads + 1, device=device)
            kwargs["alibi_slopes"] = torch.exp2(-8 * heads / self.num_q_heads)
        if self.tree:
            words = [
                tree_words(queries, generator) if index % 3 < 2 else torch.full((queries,), -1)
                for index, (queries, _) in enumerate(self.sequences)
            ]
            padding = torch.zeros(self.padding, dtype=torch.int64)
            kwargs["tree_mask"] = torch.cat([*words, padding]).to(device)
        page_table = absurd_tails(page_table, seq_lens, self.page_size).to(device)
        cu_seqlens_q = torch.tensor(starts, dtype=torch.int32, device=device)
        tables = (page_table, seq_lens.to(device), cu_seqlens_q)
        return (q, k_cache, v_cache, *tables, *k_scale, *v_scale), kwargs

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return paged_attention_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """fp32 arithmetic; weights, with their values' scales, and result rounded to the dtype of
        q, as fused kernels do."""
        out, lse = paged_attention_ref(
            *args, **kwargs, dtype=torch.float32, weights_dtype=self.dtype
        )
        return out.to(self.dtype), lse

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        if self.softcap > 0 or self.padding > 0:
            return super().prepare_baseline(*args, **kwargs)
        return prepare_sdpa(*args, **kwargs)

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """The backends of SDPA, on a GPU and where it needs no mask."""
        variants = (self.softcap, self.padding, self.sinks, self.alibi, self.per_head, self.tree)
        equal = len({*self.sequences}) == 1 and self.sequences[0][0] in (1, self.sequences[0][1])
        if any(variants) or self.window is not None or not equal or not args[0].is_cuda:
            return {}
        backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        return {
            name: prepare_sdpa(*args, **kwargs, backend=backend)
            for name, backend in backends.items()
        }

    def visible(self, queries: int, keys: int) -> list[tuple[int, int]]:
        """The range of keys that each query of a sequence sees, in a tree if it were a chain."""
        positions = range(keys - queries, keys)
        window = math.inf if self.window is None else self.window
        return [
            (
                int(max(position - window + 1, 0)),
                max(position + 1, 0) if self.causal else keys,
            )
            for position in positions
        ]

    def lengths(self, keys: int) -> list[int]:
        """Of a sequence's KV heads."""
        heads = self.num_kv_heads
        return [keys * (heads - h) // heads if self.per_head else keys for h in range(heads)]

    def head_keys(self, begin: int) -> int:
        """Of the first tokens, those that lie before what a query sees of its window."""
        return min(self.sink_tokens, begin)

    def bytes(self) -> int:
        rows = 0
        for queries, keys in self.sequences:
            for length, heads in Counter(self.lengths(keys)).items():
                seen = [(begin, end) for begin, end in self.visible(queries, length) if begin < end]
                if seen:
                    rows += (seen[-1][1] - seen[0][0] + self.head_keys(seen[0][0])) * heads
        tokens = sum(queries for queries, _ in self.sequences) + self.padding
        queries_and_outputs = tokens * self.num_q_heads * (2 * self.head_dim * self._itemsize + 4)
        row_bytes = self.head_dim * self._itemsize
        if self.kv_dtype:
            row_bytes = codes_per_row(self.head_dim, QUANTIZED_KV[self.kv_dtype]) + 4
        return 2 * rows * row_bytes + queries_and_outputs

    def flops(self) -> int:
        pairs = 0
        for queries, keys in self.sequences:
            for length, heads in Counter(self.lengths(keys)).items():
                seen = (r for r in self.visible(queries, length) if r[0] < r[1])
                pairs += heads * sum(end - begin + self.head_keys(begin) for begin, end in seen)
        return 4 * pairs * (self.num_q_heads // self.num_kv_heads) * self.head_dim

    def shape(self) -> dict[str, int | str]:
        queries, keys = max(self.sequences, key=lambda sequence: sequence[1])
        names = ("window", "sink_tokens", "split_size", "sinks", "alibi", "per_head", "tree")
        options: dict[str, int | str] = {
            name: int(value) for name in names if (value := getattr(self, name))
        }
        if len({*self.sequences}) > 1:
            options["all_keys"] = sum(keys for _, keys in self.sequences)
        return options | {
            "B": len(self.sequences),
            "S": keys,
            "HQ": self.num_q_heads,
            "HKV": self.num_kv_heads,
            "D": self.head_dim,
            "page": self.page_size,
            "kv_dtype": self.kv_dtype or SHORT_NAMES[self.dtype],
            "q_len": queries,
        }

    @property
    def _itemsize(self) -> int:
        return self.dtype.itemsize


# Prefill from nothing and onto a prefix, decoding, no keys, no queries, more queries than keys, and
# lengths on both sides of the page borders.
MIXED = ((5, 5), (1, 1), (1, 48), (3, 70), (0, 9), (1, 0), (6, 2), (1, 17), (40, 100))


def _cases() -> list[PagedAttentionCase]:
    half = torch.float16
    case = PagedAttentionCase
    return [
        case(MIXED),
        # Groups: query heads per KV head.
        *(case(MIXED, group * 2, 2, 64, 16, half) for group in (1, 3, 5, 8, 16)),
        case(((1, 33), (2, 20)), 71, 1, 64),
        # Head dims, of which most are no power of two.
        *(case(MIXED, 4, 2, dim) for dim in (8, 32, 40, 72, 80, 96, 112, 128, 160, 192, 224, 256)),
        # Page sizes.
        *(case(MIXED, 6, 2, 64, page_size, half) for page_size in (1, 3, 64, 256)),
        # Masks and scores.
        *(case(MIXED, window=window) for window in (1, 2, 16, 33, 1000)),
        *(case(MIXED, causal=False, window=window) for window in (None, 7)),
        case(MIXED, dtype=half, softcap=5.0),
        case(MIXED, dtype=half, softcap=5.0, window=9, causal=False, scale=0.3),
        case(MIXED, scale=0.0),
        case(MIXED, scale=-0.125),
        case(MIXED, sinks=True),
        case(MIXED, 6, 2, 128, 16, half, window=9, sinks=True),
        case(MIXED, alibi=True),
        case(MIXED, 6, 2, 128, 16, half, alibi=True, sinks=True, window=9),
        case(MIXED, 8, 8, 256, 16, alibi=True, softcap=5.0, causal=False),
        case(((1, 1500), (1, 3), (1, 700)), 8, 2, 128, 16, sinks=True, alibi=True),
        case(((150, 150), (70, 300)), 4, 1, 64, 16, sinks=True, alibi=True),
        case(((0, 0), (3, 0)), padding=2, sinks=True, alibi=True),
        # Pages for each KV head.
        case(MIXED, per_head=True),
        case(MIXED, 6, 3, 128, 3, half, window=9, per_head=True, sinks=True, alibi=True),
        case(MIXED, 4, 4, 256, 1, causal=False, per_head=True, padding=3),
        case(((1, 1500), (1, 3), (1, 700)), 16, 4, 128, 16, per_head=True),
        case(((150, 150), (70, 300)), 4, 2, 64, 16, half, per_head=True),
        case(((2, 40),), 2, 1, 64, 16, per_head=True),
        # Pieces of one size; decoding and a prompt in one batch.
        case(MIXED, split_size=64),
        case(((1, 1500), (1, 3), (1, 0), (1, 700)), 8, 2, 128, 16, split_size=128),
        case(((4, 1100), (2, 900)), 8, 2, 64, 64, half, window=600, split_size=64),
        case(((2, 900), (50, 300), (1, 64)), 8, 2, 256, 1, split_size=192, sinks=True, alibi=True),
        case(((1, 900), (1, 20)), 6, 3, 64, 16, per_head=True, split_size=4096),
        # A head that stays visible: within a page, a tile, over several; without a window.
        *(case(MIXED, window=window, sink_tokens=n) for window, n in ((9, 4), (1, 1), (33, 20))),
        case(MIXED, sink_tokens=4),
        case(MIXED, 4, 2, 256, 3, half, causal=False, window=5, sink_tokens=70),
        case(((1, 1500), (1, 3), (2, 700)), 8, 2, 128, 16, window=300, sink_tokens=4),
        case(((2, 1500), (1, 290), (1, 0)), 6, 3, 64, 1, window=64, sink_tokens=200, alibi=True),
        case(((3, 900), (50, 300)), 4, 2, 64, window=90, sink_tokens=5, split_size=64, sinks=True),
        case(((150, 150), (70, 300)), 4, 1, 64, 16, window=20, sink_tokens=70, alibi=True),
        case(((1, 900), (1, 20)), 6, 3, 64, window=65, sink_tokens=65, per_head=True),
        *_tree_cases(),
        # Many keys: decoding splits them. Many queries: several tiles of both.
        case(((1, 1500), (1, 3), (1, 700)), 8, 2, 128, 16),
        case(((4, 1100), (2, 900)), 8, 2, 64, 64, half, window=600),
        case(((150, 150), (70, 300)), 4, 1, 64, 16),
        case(((130, 200),), 4, 4, 128, 16, half, window=50),
        # Nothing to do, in each way; padding rows of a CUDA graph.
        case(()),
        case((), padding=3),
        case(((0, 0), (0, 7))),
        case(((1, 0), (2, 0)), padding=2),
        case(((1, 20), (0, 0)), padding=5, page_size=1),
        *_quantized_cases(),
    ]


def _tree_cases() -> list[PagedAttentionCase]:
    half = torch.float16
    # Of 1 to 64 nodes and none, without keys ahead, of fewer keys than nodes, on page borders.
    trees = ((8, 40), (1, 1), (64, 200), (5, 5), (0, 9), (6, 2), (17, 17), (3, 48), (63, 70))
    few = ((2, 900), (1, 3), (4, 700), (3, 3), (0, 0))
    case = PagedAttentionCase
    cases = [
        case(trees),
        case(trees, 6, 2, 128, 16, half, padding=3),
        case(((64, 1500), (30, 64), (64, 64)), 8, 2, 128, 64),
        *(case(trees, 4, 4, dim, 3) for dim in (40, 256)),
        case(few, 8, 2, 128, 16),
        case(few, 4, 2, 64, 1, half, softcap=5.0, sinks=True),
        case(((16, 900), (7, 130), (8, 8)), 8, 2, 128, 16, alibi=True, sinks=True),
        case(few, 6, 2, 64, 16, half, alibi=True, softcap=5.0),
        # Windows that end within the trees and ahead of them; first tokens in both.
        *(case(trees, window=window) for window in (1, 2, 5, 33, 150)),
        case(few, 8, 2, 128, 16, window=3),
        case(trees, 6, 2, 64, 16, window=4, sink_tokens=7, alibi=True),
        case(((4, 900), (3, 4), (2, 90)), 8, 2, 128, 16, half, window=70, sink_tokens=5),
        case(((4, 900), (8, 9), (2, 2)), 4, 2, 64, 1, window=2, sink_tokens=4),
        case(trees, 6, 3, 64, 16, per_head=True),
        case(few, 6, 3, 64, 1, half, per_head=True, window=20, alibi=True),
        case(trees, 8, 2, 64, 16, split_size=64),
        case(few, 8, 2, 128, 16, split_size=128, window=300),
        case(((64, 64),), 1, 1, 64, 16),
        case(((1, 20), (0, 0)), padding=5, page_size=1),
    ]
    quantized = [case(trees, 8, 2, 128, 16, kv_dtype=kv_dtype) for kv_dtype in QUANTIZED_KV] + [
        case(few, 4, 2, 80, 1, half, alibi=True, kv_dtype=kv_dtype) for kv_dtype in QUANTIZED_KV
    ]
    return [replace(each, tree=True) for each in (*cases, *quantized)]


def _quantized_cases() -> list[PagedAttentionCase]:
    half, bf16 = torch.float16, torch.bfloat16
    long = ((1, 1500), (1, 3), (1, 700))
    case = PagedAttentionCase
    cases = [
        # Head dims: whole vectors, half ones, quarters; pages and groups beside them.
        case(MIXED, 8, 2, 64, 16, bf16),
        case(MIXED, 2, 2, 80, 1, half),
        case(MIXED, 6, 2, 96, 64, bf16),
        case(MIXED, 16, 2, 128, 16, half),
        case(MIXED, 8, 2, 192, 3, bf16),
        case(MIXED, 3, 1, 256, 64, half),
        *(case(MIXED, 4, 2, dim, 16, bf16) for dim in (8, 40, 48, 72, 200)),
        # Masks and scores; many keys; many queries; padding.
        case(MIXED, 8, 2, 128, 16, bf16, window=16),
        case(MIXED, 8, 2, 64, 16, half, softcap=5.0, window=9, causal=False),
        case(long, 8, 2, 128, 16, bf16),
        case(((4, 1100), (2, 900)), 8, 2, 64, 64, half, window=600),
        case(((150, 150), (70, 300)), 4, 1, 128, 16, bf16),
        case(((130, 200),), 4, 4, 256, 16, half, window=50),
        case(((1, 20), (0, 0)), 8, 2, 64, 1, bf16, padding=5),
        case(MIXED, 8, 2, 128, 16, bf16, sinks=True, alibi=True),
        case(long, 8, 2, 128, 16, half, sinks=True, alibi=True),
        case(MIXED, 6, 3, 64, 16, bf16, per_head=True),
        case(long, 8, 4, 128, 1, half, per_head=True),
        case(long, 8, 2, 128, 16, bf16, split_size=256),
        case(MIXED, 8, 2, 80, 1, half, window=30, split_size=64),
        case(long, 8, 2, 128, 16, bf16, window=200, sink_tokens=4),
        case(MIXED, 8, 2, 256, 16, half, window=20, sink_tokens=18),
    ]
    return [replace(each, kv_dtype=kv_dtype) for kv_dtype in QUANTIZED_KV for each in cases]


CASES = _cases()
CPU_CASES = [
    PagedAttentionCase(MIXED, heads, 2, dim, page_size, torch.float32, **options)
    for heads, dim, page_size, options in (
        (2, 64, 16, {}),
        (6, 40, 3, {"window": 5}),
        (8, 256, 1, {"softcap": 3.0}),
        (10, 72, 64, {"causal": False}),
        (6, 64, 16, {"sinks": True, "alibi": True}),
        (6, 64, 16, {"per_head": True, "window": 7}),
        (4, 64, 16, {"window": 7, "sink_tokens": 10}),
        (6, 64, 16, {"tree": True}),
        (6, 40, 3, {"tree": True, "window": 4, "sink_tokens": 9, "alibi": True}),
    )
]


def _bench() -> list[PagedAttentionCase]:
    case = PagedAttentionCase
    one = ((1, 4096),) * 8  # what variants below are to be compared with
    lengths = (1, 128, 1024, 4096, 32768, 131072)
    batches = ((8, 4096), (16, 2048), (32, 2048), (32, 4096), (64, 4096), (128, 1024), (256, 1024))
    decode = [((1, keys),) * batch for batch, keys in (*((1, keys) for keys in lengths), *batches)]
    long_and_short = ((1, 65536), *(((1, 300),) * 63))
    ragged = tuple((1, i * 977 % 8000 + 20) for i in range(32))
    cases = [case(sequences, 32, 8, 128, 64) for sequences in (*decode, long_and_short, ragged)]
    # Query heads per KV head, page sizes, head dims.
    cases += [case(one, 8 * group, 8, 128, 64) for group in (1, 3, 5, 7, 8, 16)]
    cases += [case(one, 32, 8, 128, page_size) for page_size in (1, 8, 16, 256)]
    cases += [case(one, 32, 8, dim, 64) for dim in (64, 80, 96, 192, 256)]
    # A small model, a few tokens to verify.
    cases += [case(((1, 2048),) * 8, 4, 1, 64, 16), case(((5, 4096),) * 8, 32, 8, 128, 64)]
    variants: list[dict[str, Any]] = [
        {"sinks": True},
        {"alibi": True},
        {"per_head": True},
        {"split_size": 256},
        {"split_size": 1024},
        {"window": 1024},
        {"window": 1024, "sink_tokens": 4},
    ]
    cases += [case(one, 32, 8, 128, 64, **each) for each in variants]
    cases += [
        case(((1, keys),) * batch, 32, 8, 128, 64, kv_dtype=kv_dtype)
        for kv_dtype in QUANTIZED_KV
        for batch, keys in ((1, 4096), (8, 4096), (32, 2048), (64, 4096))
    ]
    # A step of decoding beside one of 4, 8 and 16 nodes to verify: 16, 32 and 64 rows per KV head.
    cases += [
        case(((nodes, keys),) * batch, 32, 8, 128, 64, tree=nodes > 1)
        for batch in (1, 8, 32)
        for keys in (4096, 32768)
        for nodes in (1, 4, 8, 16)
        if nodes > 1 or (batch, keys) in ((8, 32768), (32, 32768))  # the others are above
    ]
    prompts = ((2048, 4, 1, 64), (2048, 32, 8, 128), (8192, 32, 8, 128), (16384, 32, 8, 128))
    return cases + [
        case(((keys, keys),), heads, kv_heads, dim, 64) for keys, heads, kv_heads, dim in prompts
    ]


BENCH = _bench()
CPU_BENCH = [
    PagedAttentionCase(((1, 4096),) * batch, 32, 8, 128, 64, dtype, kv_dtype=kv_dtype)
    for batch in (1, 4)
    for dtype, kv_dtype in (
        (torch.float32, None),
        *((torch.bfloat16, name) for name in (None, *QUANTIZED_KV)),
    )
    if batch > 1 or dtype is torch.float32  # the others of one sequence are in BENCH
]
