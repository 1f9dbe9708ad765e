"""What one step of a paged cache tells the attention ops.

Dimensions: B rows of the step, T new tokens, P page size, MAXP pages per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import ops
from .._host import TokenTree

if TYPE_CHECKING:
    from .eviction import Eviction

# Index arithmetic on the host is numpy's: torch would start its thread pool for a few integers.
IntArray = npt.NDArray[np.int32]
AnyArray = npt.NDArray[Any]
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


@dataclass(frozen=True)
class PagedBatch:
    """What attention needs to know about one step.

    `page_table` and `seq_lens` are views of the cache's own tensors: valid until the next `step`.
    """

    page_table: Tensor  # int32 [B, MAXP]; row b lists the pages of the b-th sequence
    seq_lens: Tensor  # int32 [B]; keys per sequence, the new tokens included
    cu_seqlens_q: Tensor  # int32 [B + 1]; tokens of row b are cu_seqlens_q[b] .. cu_seqlens_q[b+1]
    max_seqlen_q: int  # most new tokens of any row
    num_tokens: int  # new tokens of all rows; those of the T behind them are padding
    slot_mapping: Tensor  # int64 [T]; page * P + offset of each new token, -1 for padding
    positions: Tensor  # int64 [T]; position of each new token in its sequence, 0 for padding
    tree_mask: Tensor | None = None  # int64 [T]; which new tokens each one sees, None: all before
    eviction: Eviction | None = None  # of caches that evict: what this step does about it

    def attention(
        self,
        q: Tensor,
        layer: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        sinks: Tensor | None,
        alibi_slopes: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """``ops.paged_attention`` of the step: out and lse of q [T, HQ, D] to what a layer of the
        cache holds, as ``PagedKVCache.layer`` gives it."""
        k_cache, v_cache, k_scale, v_scale = layer
        return ops.paged_attention(
            q,
            k_cache,
            v_cache,
            self.page_table,
            self.seq_lens,
            self.cu_seqlens_q,
            k_scale,
            v_scale,
            sinks,
            alibi_slopes,
            self.tree_mask,
            max_seqlen_q=self.max_seqlen_q,
            **options,
        )

    def with_trees(self, trees: Sequence[TokenTree]) -> PagedBatch:
        """The same step with the new tokens of row b being the nodes of `trees[b]`, in their order.

        Nodes stand at the position of their depth, in slots of their own; which of them stay is
        decided afterwards (`ops.tree_verify`, `ops.kv_compact`, `PagedKVCache.crop`). A row without
        drafts is a tree of one node. ValueError for trees that have not as many nodes as there are
        tokens; padding needs none.
        """
        if self.eviction is not None:
            raise ValueError("PagedBatch.with_trees: a cache that evicts takes no trees")
        words = list(chain.from_iterable(tree.mask_bits for tree in trees))
        if len(words) != self.num_tokens:
            raise ValueError(
                f"PagedBatch.with_trees: trees must have {self.num_tokens} nodes, as many as the "
                f"step has tokens, got {len(words)}"
            )
        numbers = chain.from_iterable(range(len(tree)) for tree in trees)
        of_tokens = np.zeros((2, len(self.positions)), dtype=np.int64)
        of_tokens[0, len(words) :] = -1
        of_tokens[0, : len(words)] = words
        of_tokens[1, : len(words)] = list(chain.from_iterable(tree.depths for tree in trees))
        of_tokens[1, : len(words)] -= np.array(list(numbers), dtype=np.int64)
        tree_mask, moved = torch.from_numpy(of_tokens).to(self.positions.device, non_blocking=True)
        return replace(self, tree_mask=tree_mask, positions=self.positions + moved)


def index_arrays(
    page_table: IntArray,
    page_size: int,
    starts: list[int],
    counts: list[int],
    evicted: list[int],
    num_rows: int,
    num_tokens: int,
) -> tuple[AnyArray, AnyArray, AnyArray, AnyArray]:
    """seq_lens [B], cu_seqlens_q [B + 1], slot_mapping [T] and positions [T] of a step.

    Row b holds `starts[b]` tokens and gets `counts[b]` more, after `evicted[b]` others that it has
    seen and no longer holds; up to B = `num_rows` rows follow that have no tokens, and up to T =
    `num_tokens` tokens that belong to no row. `page_table`: [>= B, MAXP], the pages of the new
    tokens included.
    """
    n, first = np.array(counts, dtype=np.int64), np.array(starts, dtype=np.int64)
    seq_lens = np.zeros(num_rows, dtype=np.int32)
    seq_lens[: len(n)] = first + n
    ends = n.cumsum()
    total = int(ends[-1]) if counts else 0
    cu_seqlens_q = np.full(num_rows + 1, total, dtype=np.int32)
    cu_seqlens_q[: len(n)] = ends - n
    row = np.repeat(np.arange(len(n)), n)
    at = np.arange(total) + (first + n - ends)[row]  # the slots of the new tokens
    positions = np.zeros(num_tokens, dtype=np.int64)
    positions[:total] = at + np.array(evicted, dtype=np.int64)[row]
    slot_mapping = np.full(num_tokens, -1, dtype=np.int64)
    slot_mapping[:total] = page_table[row, at // page_size].astype(np.int64) * page_size
    slot_mapping[:total] += at % page_size
    return seq_lens, cu_seqlens_q, slot_mapping, positions


def upload(arrays: Sequence[AnyArray], device: torch.device) -> list[Tensor]:
    """Arrays of one dimension as tensors on the device, in one transfer that is not waited for.

    From pageable memory it is safe: the driver has taken its copy when the call returns.
    """
    # Multiples of 16 bytes, as kernels like them.
    starts = [0, *accumulate(-(-array.nbytes // 16) * 16 for array in arrays)]
    host = np.empty(starts[-1], dtype=np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes].view(array.dtype)[:] = array
    memory = torch.from_numpy(host).to(device, non_blocking=True)
    return [
        memory[start : start + array.nbytes].view(_DTYPES[array.dtype])
        for start, array in zip(starts, arrays, strict=False)
    ]
