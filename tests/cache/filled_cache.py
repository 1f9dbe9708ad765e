"""A small cache whose tokens are numbers: what the tests of the cache share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm import ops
from effllm.cache import PagedBatch, PagedKVCache

LAYERS, HKV, D = 2, 2, 8


def make_cache(device: str = "cpu", **sizes: Any) -> PagedKVCache:
    sizes = {"max_batch": 4, "max_seq_len": 20, "page_size": 4, "dtype": torch.float32} | sizes
    return PagedKVCache(LAYERS, HKV, D, device=device, **sizes)


def state(cache: PagedKVCache) -> object:
    """Everything that a failed call must leave alone."""
    pool = cache.pool
    counts = [(pool.ref_count(p), pool.is_committed(p)) for p in range(pool.num_pages)]
    return dict(cache._seqs), counts, pool.num_free, cache.page_table.tolist()


def write(cache: PagedKVCache, batch: PagedBatch, values: Tensor) -> None:
    """Stores value t (fp32 [T]) as the keys, and its negative as the values, of token t."""
    rows = values[:, None, None].expand(-1, HKV, D).to(cache.k[0].device, cache.k[0].dtype)
    for layer in range(cache.num_layers):
        k, v = cache.k[layer], cache.v[layer]
        ops.kv_append(rows + layer, -rows - layer, k, v, batch.slot_mapping)


def contents(cache: PagedKVCache, seq_id: int, layer: int = 0) -> list[float]:
    """The stored values of a sequence, read through its pages; they agree over heads and dims."""
    pages = torch.tensor(cache.pages(seq_id), dtype=torch.int64)
    k, v = (t[layer].cpu()[pages].flatten(0, 1)[: cache.length(seq_id)] for t in (cache.k, cache.v))
    assert torch.equal(k, -v)
    assert torch.equal(k, k[:, :1, :1].expand_as(k))
    return (k[:, 0, 0] - layer).tolist()


def feed(cache: PagedKVCache, seq_id: int, values: list[float]) -> None:
    write(cache, cache.step([(seq_id, len(values))]), torch.tensor(values))
