"""Steps of few tokens over fixed memory, which a GPU replays as CUDA graphs.

Launching the kernels of a step one by one takes a host longer than the kernels of a small batch
run; a graph is one launch. It is recorded with addresses and shapes, so steps are padded to few
shapes and copied to where the graph of theirs reads. Lengths and page tables are data on the
device: what was recorded over short texts holds for long ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effllm._host import TokenTree
from effllm.cache import PagedBatch, PagedKVCache

Output = tuple[Tensor, Tensor | None]
"""Logits [T, V] and hidden states [T, hidden_size]; the latter may be left out."""

Forward = Callable[[PagedBatch, Tensor], Output]
"""The model over the tokens [T] of a step; it must not look at values on the device."""

_PATIENCE = 16  # steps of a shape that a larger graph takes before it has one of its own
_CHEAP_TOKENS = 64  # padding up to here costs little: weights are read once for all tokens


def graph_problem(model: Any) -> str | None:
    """Why steps of the model cannot be graphs, None if they can.

    The class says so itself, by the attribute that transformers asks before it compiles a model as
    one graph; what a rotary embedding does with lengths it leaves out.
    """
    device = model.device
    if device.type != "cuda":
        return f"it is on {device}"
    if any(tensor.device != device for tensor in model.parameters()):
        return f"not all of it is on {device}"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "its class does not say _can_compile_fullgraph"
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for kind in types.values() if isinstance(types, dict) else [types]:
            if kind is not None and ("dynamic" in kind or kind == "longrope"):
                return f"its rotary embedding, {kind!r}, looks at lengths"
    return None


def use_graphs(model: Any, cuda_graphs: bool | None, owner: str = "effllm.generate") -> bool:
    """What the keyword of ``owner`` comes to; ValueError for True where graphs cannot be."""
    if cuda_graphs is False:
        return False
    problem = graph_problem(model)
    if problem and cuda_graphs:
        raise ValueError(
            f"{owner}: cuda_graphs must be False or None for this {type(model).__name__}: {problem}"
        )
    return problem is None


def record(run: Callable[[], Output], stream: torch.cuda.Stream, pool: Any) -> Callable[[], Output]:
    """What replays ``run`` and returns the memory that it wrote its results to."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Output:
        graph.replay()
        return out

    return replay


class _Shape(NamedTuple):
    """Of a step: sequences, tokens for each, and whether there are branches."""

    rows: int
    per_row: int
    branching: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.per_row

    def may_replace(self, other: _Shape) -> bool:
        """Whether a step of the other fits in, at a price that may be paid some times."""
        fits = self.rows >= other.rows and self.per_row >= other.per_row
        alike = self.branching == other.branching
        return fits and alike and self.tokens <= max(_CHEAP_TOKENS, 4 * other.tokens)


@dataclass
class _Bucket:
    """Memory of the steps of one shape, and their graph once it is recorded."""

    ids: Tensor
    batch: PagedBatch
    replay: Callable[[], Output] | None = None
    ran: bool = False

    def load(self, ids: Tensor, batch: PagedBatch) -> None:
        """The page table and the lengths are the cache's own and in their place already."""
        self.batch.cu_seqlens_q.copy_(batch.cu_seqlens_q)
        targets = [self.ids, self.batch.slot_mapping, self.batch.positions]
        sources = [ids, batch.slot_mapping, batch.positions]
        if self.batch.tree_mask is not None and batch.tree_mask is not None:
            targets.append(self.batch.tree_mask)
            sources.append(batch.tree_mask)
        torch._foreach_copy_(targets, sources)


class StepGraphs:
    """Graphs of the steps of one cache, by shape.

    The shape of a step is its number of sequences and the most tokens of any of them, both rounded
    up to a power of two, and whether there are branches. The first step of a shape only runs, over
    the memory that the graph will have: what is done once in a process is done then. The second is
    recorded. Until a shape has come some times, a larger graph takes its steps if there is one:
    batches that end, and trees that get smaller at the end of a text, pass through many shapes. All
    graphs share the memory of what lives no longer than their run. They and their memory go with
    the last reference to this.
    """

    def __init__(self, cache: PagedKVCache, max_tokens: int) -> None:
        """``max_tokens``: of any sequence, of the steps that ``takes`` says yes to."""
        self._cache = cache
        self._max_tokens = max_tokens
        self._buckets: dict[_Shape, _Bucket] = {}
        self._came: Counter[_Shape] = Counter()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def takes(self, counts: Sequence[int]) -> bool:
        """Whether a step with so many tokens of each sequence is one of few."""
        return max(counts, default=0) in range(1, self._max_tokens + 1)

    def step(
        self,
        forward: Forward,
        fed: Sequence[tuple[int, Sequence[int]]],
        trees: Sequence[TokenTree] | None = None,
    ) -> tuple[PagedBatch, Tensor, Tensor | None]:
        """Feeds tokens to sequences; returns the step, logits and hidden states of all T tokens.

        ``forward`` is always the same; it is not kept, as it may well hold this object. The results
        are overwritten by the next step.
        """
        counts = [len(tokens) for _, tokens in fed]
        rows = min(_power_of_two(len(fed)), self._cache.max_batch)
        shape = self._choose(_Shape(rows, _power_of_two(max(counts)), trees is not None))
        batch = self._cache.step(
            [(seq, len(tokens)) for seq, tokens in fed],
            num_rows=shape.rows,
            num_tokens=shape.tokens,
        )
        if trees is not None:
            batch = batch.with_trees(trees)
        if shape not in self._buckets:
            self._buckets[shape] = self._make_bucket(batch, shape.per_row)
        bucket = self._buckets[shape]
        ids = np.zeros(shape.tokens, dtype=np.int64)
        ids[: batch.num_tokens] = list(chain.from_iterable(tokens for _, tokens in fed))
        bucket.load(torch.from_numpy(ids).to(bucket.ids.device, non_blocking=True), batch)
        if bucket.ran and bucket.replay is None:
            bucket.replay = self._record(forward, bucket)
        bucket.ran = True
        run = bucket.replay or partial(forward, bucket.batch, bucket.ids)
        logits, hidden = run()
        total = batch.num_tokens
        return batch, logits[:total], None if hidden is None else hidden[:total]

    def _choose(self, shape: _Shape) -> _Shape:
        """The shape itself, or that of the smallest graph that takes its steps for now."""
        self._came[shape] += 1
        graphs = [other for other, bucket in self._buckets.items() if bucket.replay is not None]
        if shape in graphs or self._came[shape] > _PATIENCE:
            return shape
        larger = [other for other in graphs if other.may_replace(shape)]
        return min(larger, key=lambda other: other.tokens, default=shape)

    def _make_bucket(self, batch: PagedBatch, per_row: int) -> _Bucket:
        ids = torch.empty_like(batch.positions)
        fixed = PagedBatch(
            page_table=batch.page_table,
            seq_lens=batch.seq_lens,
            cu_seqlens_q=torch.empty_like(batch.cu_seqlens_q),
            max_seqlen_q=per_row,
            num_tokens=len(ids),
            slot_mapping=torch.empty_like(batch.slot_mapping),
            positions=torch.empty_like(batch.positions),
            tree_mask=None if batch.tree_mask is None else torch.empty_like(batch.tree_mask),
        )
        return _Bucket(ids, fixed)

    def _record(self, forward: Forward, bucket: _Bucket) -> Callable[[], Output] | None:
        device = self._cache.page_table.device
        if device.type != "cuda":
            return None  # the same steps over the same memory, to be looked at without a GPU
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
                self._pool = torch.cuda.graph_pool_handle()
            try:
                run = partial(forward, bucket.batch, bucket.ids)
                return record(run, self._stream, self._pool)
            except RuntimeError as error:
                raise RuntimeError(
                    "effllm.generate: a step of the model cannot be recorded as a CUDA graph; "
                    "cuda_graphs=False runs it without"
                ) from error


def _power_of_two(n: int) -> int:
    """The least that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
