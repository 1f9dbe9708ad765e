"""Pages of a sequence on their way to host memory and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._kv_codes import as_bits


def to_host(caches: Sequence[Tensor], pages: Sequence[int]) -> tuple[Tensor, ...]:
    """These pages of every cache [NP, ...], each as [len(pages), ...] in host memory.

    From a GPU the copies run on the current stream, into pinned memory, and are not waited for:
    only work on that stream may read them. One cache at a time is gathered on the device.
    """
    index = _index(caches, pages)
    host = []
    for cache in caches:
        rows = as_bits(cache).index_select(0, index)
        if rows.is_cuda:
            rows = torch.empty_like(rows, device="cpu", pin_memory=True).copy_(
                rows, non_blocking=True
            )
        host.append(rows)
    return tuple(host)


def from_host(host: Sequence[Tensor], caches: Sequence[Tensor], pages: Sequence[int]) -> None:
    """Writes what ``to_host`` returned into other pages of the same caches."""
    index = _index(caches, pages)
    for rows, cache in zip(host, caches, strict=True):
        as_bits(cache).index_copy_(0, index, rows.to(cache.device, non_blocking=True))


def _index(caches: Sequence[Tensor], pages: Sequence[int]) -> Tensor:
    return torch.tensor(pages, dtype=torch.int64).to(caches[0].device, non_blocking=True)
