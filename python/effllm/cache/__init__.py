"""KV caches: the paged cache, the page pool behind it, and policies of what to keep."""

from .._host import BlockPool, OutOfPages
from .batch import PagedBatch
from .context import PagedContext
from .evicting import EvictingKVCache
from .paged import PagedKVCache
from .policy import H2O, TOVA, CachePolicy, Full, SnapKV, StreamingLLM

__all__ = [
    "H2O",
    "TOVA",
    "BlockPool",
    "CachePolicy",
    "EvictingKVCache",
    "Full",
    "OutOfPages",
    "PagedBatch",
    "PagedContext",
    "PagedKVCache",
    "SnapKV",
    "StreamingLLM",
]
