"""Paged attention as plain PyTorch does it: what benchmarks compare ``paged_attention`` with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops._kv_codes import as_bits, dequantize_kv
from ..ops.paged_attention import along_paths

Call = Callable[[], Any]


def prepare_sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    max_seqlen_q: int = 0,
    split_size: int | None = None,
    backend: SDPBackend | None = None,
) -> Call:
    """``scaled_dot_product_attention`` over keys and values gathered, and decoded, beforehand.

    One call where sequences are equally long, else one for each, or for each KV head that has a
    length of its own; keys that no query sees are left out; a float mask for what SDPA does not
    know: trees, windows over several queries, slopes, and sinks, which become a key without a
    value.
    Arguments are those of ``paged_attention``; ``max_seqlen_q`` and ``split_size`` change no value.
    ``backend``: the only one that may be used, None is torch's choice. Raises ValueError for a
    softcap, which SDPA has not.
    """
    if softcap > 0:
        raise ValueError(f"prepare_sdpa: softcap must be 0, got {softcap}")
    starts, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    group = q.shape[1] // k_cache.shape[2]
    device = q.device

    def gather(cache: Tensor, words: Tensor | None, rows: Tensor, idx: Tensor, h: slice) -> Tensor:
        page_size = cache.shape[1]
        where = rows[:, idx // page_size].long(), idx % page_size
        found = as_bits(cache)[where].view(cache.dtype)
        if words is not None:
            found = dequantize_kv(found, words[where], q.dtype)
        return found[:, :, h].transpose(1, 2).contiguous()

    def prepare(seqs: slice, rows: Tensor, h: slice, queries: int, keys: int) -> Call:
        """Of sequences of one shape; ``rows``: their page tables, ``h``: KV heads."""
        position = torch.arange(keys - queries, keys, device=device)[:, None]
        key = torch.arange(keys, device=device)
        visible = (key <= position) if causal else torch.ones_like(key <= position)
        if tree_mask is not None:  # of each sequence: [B, queries, keys] instead of [queries, keys]
            words = tree_mask[starts[seqs.start] : starts[seqs.stop]].view(-1, queries)
            paths = zip(*(along_paths(of_seq, keys) for of_seq in words), strict=True)
            visible, key, position = (torch.stack(of_seqs)[:, None] for of_seqs in paths)
        if window is not None:
            visible = visible & ((key > position - window) | (key < sink_tokens))
        idx = visible.flatten(0, -2).any(0).nonzero()[:, 0]
        visible, key = visible[..., idx], key[..., idx]
        of_q = slice((h.start or 0) * group, None if h.stop is None else h.stop * group)
        x = q[starts[seqs.start] : starts[seqs.stop], of_q]
        x = x.view(-1, queries, *x.shape[1:]).transpose(1, 2)
        k = gather(k_cache, k_scale, rows, idx, h)
        v = gather(v_cache, v_scale, rows, idx, h)
        is_causal = causal and queries == keys > 1 and window is None
        is_causal = is_causal and alibi_slopes is None and sinks is None and tree_mask is None
        mask = None
        if not is_causal and not (bool(visible.all()) and alibi_slopes is None and sinks is None):
            masks = 1 if tree_mask is None else len(x)
            mask = torch.zeros(masks, x.shape[1], queries, len(idx), device=device)
            mask.masked_fill_(~visible, -torch.inf)
            if alibi_slopes is not None:
                mask -= alibi_slopes[of_q][:, None, None] * (position - key).abs()
            if sinks is not None:
                column = sinks[of_q][:, None, None].expand(masks, x.shape[1], queries, 1)
                mask = torch.cat([mask, column], -1)
                k, v = (torch.nn.functional.pad(side, (0, 0, 0, 1)) for side in (k, v))
            mask = mask.to(q.dtype)
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            x, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )

    per_head = seq_lens.dim() == 2
    batch, whole = len(starts) - 1, slice(None)
    counts = [after - before for before, after in pairwise(starts)]
    if not per_head and len(set(zip(counts, lengths, strict=True))) == 1:
        calls = [prepare(slice(0, batch), page_table, whole, counts[0], lengths[0])]
    else:
        calls = [
            prepare(slice(b, b + 1), rows, h, counts[b], keys)
            for b in range(batch)
            for h, rows, keys in (
                [
                    (slice(i, i + 1), page_table[b : b + 1, i], lengths[b][i])
                    for i in range(k_cache.shape[2])
                ]
                if per_head
                else [(whole, page_table[b : b + 1], lengths[b])]
            )
            if counts[b] > 0 and keys > 0
        ]

    def run() -> list[Tensor]:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return [call() for call in calls]

    return run
