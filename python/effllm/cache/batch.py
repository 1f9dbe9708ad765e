"""What one step of a paged cache tells the attention ops.

Dimensions: B rows of the step, T new tokens, P page size, MAXP pages per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._host import TokenTree

# Index arithmetic on the host is numpy's: torch would start its thread pool for a few integers.
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PagedBatch:
    """What attention needs to know about one step.

    `page_table` and `seq_lens` are views of the cache's own tensors: valid until the next `step`.
    """

    page_table: Tensor  # int32 [B, MAXP]; row b lists the pages of the b-th sequence
    seq_lens: Tensor  # int32 [B]; keys per sequence, the new tokens included
    cu_seqlens_q: Tensor  # int32 [B + 1]; tokens of row b are cu_seqlens_q[b] .. cu_seqlens_q[b+1]
    max_seqlen_q: int  # most new tokens of any row
    slot_mapping: Tensor  # int64 [T]; page * P + offset of each new token, -1 for padding
    positions: Tensor  # int64 [T]; position of each new token in its sequence, 0 for padding
    tree_mask: Tensor | None = None  # int64 [T]; which new tokens each one sees, None: all before

    def with_trees(self, trees: Sequence[TokenTree]) -> PagedBatch:
        """The same step with the new tokens of row b being the nodes of `trees[b]`, in their order.

        Nodes stand at the position of their depth, in slots of their own; which of them stay is
        decided afterwards (`ops.tree_verify`, `ops.kv_compact`, `PagedKVCache.crop`). A row without
        drafts is a tree of one node. ValueError for trees that have not as many nodes as there are
        tokens; padding rows need none.
        """
        words = [word for tree in trees for word in tree.mask_bits]
        moves = [depth - node for tree in trees for node, depth in enumerate(tree.depths)]
        count = len(self.positions)
        padding = (len(self.seq_lens) - len(trees)) * (len(trees[0]) if trees else 1)
        if len(words) + padding != count:
            raise ValueError(
                f"PagedBatch.with_trees: trees must have {count - padding} nodes, as many as the "
                f"step has tokens, got {len(words)}"
            )
        of_tokens = torch.tensor([words + [-1] * padding, moves + [0] * padding])
        tree_mask, moved = of_tokens.to(self.positions.device, non_blocking=True)
        return replace(self, tree_mask=tree_mask, positions=self.positions + moved)


def index_tensors(
    page_table: IntArray, page_size: int, starts: list[int], counts: list[int], padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """seq_lens [B], cu_seqlens_q [B + 1], slot_mapping [T] and positions [T] of a step, on the CPU.

    Row b holds `starts[b]` tokens and gets `counts[b]` more; `padding` rows follow, as long as the
    first one. `page_table`: [>= B, MAXP], the pages of the new tokens included.
    """
    per_padding_row = counts[0] if counts else 1
    n = np.array(counts + [per_padding_row] * padding, dtype=np.int64)
    first = np.array(starts + [0] * padding, dtype=np.int64)
    cu_seqlens_q = np.concatenate([[0], n.cumsum()])
    row = np.repeat(np.arange(len(n)), n)
    positions = np.arange(len(row)) + (first - cu_seqlens_q[:-1])[row]
    pages = page_table[row, positions // page_size].astype(np.int64)
    slot_mapping = pages * page_size + positions % page_size
    seq_lens = first + n

    slot_mapping[sum(counts) :] = -1
    positions[sum(counts) :] = 0
    seq_lens[len(counts) :] = 0
    return (
        torch.from_numpy(seq_lens.astype(np.int32)),
        torch.from_numpy(cu_seqlens_q.astype(np.int32)),
        torch.from_numpy(slot_mapping),
        torch.from_numpy(positions),
    )
