"""KV caches: the paged cache and the page pool behind it."""

from .._host import BlockPool, OutOfPages
from .batch import PagedBatch
from .context import PagedContext
from .paged import PagedKVCache

__all__ = ["BlockPool", "OutOfPages", "PagedBatch", "PagedContext", "PagedKVCache"]
