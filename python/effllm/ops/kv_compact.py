"""kv_compact: the keys and values of an accepted path of draft tokens, moved together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._load import ops
from ._kv_codes import as_bits

_op = ops.kv_compact.default


def kv_compact(
    caches: Sequence[Tensor],
    page_table: Tensor,
    prefix_lens: Tensor,
    accept_index: Tensor,
    num_accepted: Tensor,
) -> None:
    """Move the rows of each tree's accepted nodes to where their tokens stand in the text.

    Nodes of a tree of draft tokens lie one after the other behind the text: node i of tree b at
    position prefix_lens[b] + i, whose page is entry position // P of row b of the page table. After
    ``tree_verify`` the rows of node accept_index[b, i] go to position prefix_lens[b] + i, for every
    i below num_accepted[b], in all caches in one launch. Bits are moved as they are. Positions
    behind the path keep what they hold: the sequence now ends before them, at
    prefix_lens + num_accepted.

    Args:
        caches: any number of tensors [NP, P, HKV, D] or [NP, P, HKV], of any dtypes (bf16, e4m3,
            uint8, fp32, ...), D of each its own; any strides with stride(-1) == 1 if there is a D:
            K and V of all layers, and the scales of quantised caches. They must not share memory:
            of a latent cache, whose values are part of its keys, give the keys alone.
        page_table: int32 [B, MAXP], or [B, HKV, MAXP] where KV heads have tables of their own;
            stride(-1) == 1.
        prefix_lens: int32 [B], or [B, HKV] beside such tables: the position of each tree's root.
        accept_index: int32 [B, W], numbers of nodes in ascending order, as ``tree_verify`` gives
            them, stride(-1) == 1; only the first num_accepted[b] of a row count.
        num_accepted: int32 [B], in [0, W].

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or, on the CPU, a path that does
            not ascend, or a node at a position or page that is none, before anything is written. A
            GPU, which cannot raise, leaves out moves from or to such places, and leaves undefined
            what a path moves that does not ascend.

    Source:
        csrc/kvcache/kv_compact.h. Trees as in SpecInfer (arXiv:2305.09781), pages as in
        PagedAttention (arXiv:2309.06180).
    """
    _op(caches, page_table, prefix_lens, accept_index, num_accepted)


@torch.library.register_fake(_op.name())
def _fake(
    caches: Sequence[Tensor],
    page_table: Tensor,
    prefix_lens: Tensor,
    accept_index: Tensor,
    num_accepted: Tensor,
) -> None:
    torch._check(
        page_table.dim() in (2, 3) and prefix_lens.shape == page_table.shape[:-1],
        lambda: (
            "kv_compact: page_table and prefix_lens must be [B, MAXP] and [B], or [B, HKV, MAXP] "
            f"and [B, HKV], got {list(page_table.shape)} and {list(prefix_lens.shape)}"
        ),
    )
    torch._check(
        accept_index.dim() == 2
        and num_accepted.dim() == 1
        and accept_index.shape[0] == num_accepted.shape[0] == page_table.shape[0],
        lambda: (
            "kv_compact: accept_index and num_accepted must be [B, W] and [B] with B = "
            f"{page_table.shape[0]}, got {list(accept_index.shape)} and {list(num_accepted.shape)}"
        ),
    )
    for index, cache in enumerate(caches):
        torch._check(
            cache.dim() in (3, 4) and cache.shape[:3] == caches[0].shape[:3],
            lambda index=index, cache=cache: (
                f"kv_compact: caches[{index}] must be [NP, P, HKV, D] or [NP, P, HKV] as caches[0] "
                f"is, {list(caches[0].shape)}, got {list(cache.shape)}"
            ),
        )


def kv_compact_ref(
    caches: Sequence[Tensor],
    page_table: Tensor,
    prefix_lens: Tensor,
    accept_index: Tensor,
    num_accepted: Tensor,
) -> tuple[Tensor, ...]:
    """Plain PyTorch: copies of the caches as kv_compact leaves them."""
    results = [cache.clone() for cache in caches]
    if not results:
        return ()
    _, page_size, num_heads = caches[0].shape[:3]
    tables = page_table if page_table.dim() == 3 else page_table[:, None].expand(-1, num_heads, -1)
    prefixes = prefix_lens if prefix_lens.dim() == 2 else prefix_lens[:, None].expand(-1, num_heads)
    for tree, count in enumerate(num_accepted.tolist()):
        for head in range(num_heads):
            first = prefixes[tree, head]
            sources = (first + accept_index[tree, :count]).long()
            targets = (first + torch.arange(count, device=page_table.device)).long()
            table = tables[tree, head].long()
            source_pages, target_pages = table[sources // page_size], table[targets // page_size]
            for cache, result in zip(caches, results, strict=True):
                rows = as_bits(cache)[source_pages, sources % page_size, head]
                as_bits(result)[target_pages, targets % page_size, head] = rows
    return tuple(results)
