"""PagedCache: a transformers ``Cache`` over our pages, for ``model.generate``."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from effllm.cache import CachePolicy, EvictingKVCache, Full, PagedContext, PagedKVCache
from effllm.cache.paged import check_kv_dtype


class PagedCache(Cache):
    """Keys and values of ``model.generate`` in a ``PagedKVCache``.

        model.set_attn_implementation("effllm")
        model.generate(**inputs, past_key_values=PagedCache(model.config, max_seq_len=2048))

    (transformers after 5.17 calls the keyword ``cache`` and still takes the old name.)

    transformers counts padded columns; the pages hold only real tokens. ``update`` therefore does
    not write: it hands the new keys on, marked, and the registered attention, which also knows the
    padding mask, appends them. Beam search and assisted decoding share pages copy-on-write.

    So does ``copy.deepcopy``: fill a cache with a prompt once, and continue a copy of it for each
    question. Copies live in the memory of the first cache until they are dropped.

    Raises ValueError for a model with another attention implementation (at the first token) or
    with layers other than full and sliding-window attention.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_seq_len: int,
        max_batch: int | None = None,
        page_size: int = 16,
        kv_dtype: str | None = None,
        cache_policy: CachePolicy | None = None,
        max_prompt: int | None = None,
    ) -> None:
        """Memory is allocated at the first token, in the model's dtype and on its device.

        Args:
            config: the model's config.
            max_seq_len: most tokens of one sequence, prompt and generated ones.
            max_batch: most sequences at a time, beams and those of copies included; by default as
                many as the first call brings.
            page_size: tokens per page.
            kv_dtype: "e4m3", "int8" or "int4" to keep keys and values in 8 or 4 bits.
            cache_policy: of ``effllm.cache``, which keys and values to keep, as
                ``effllm.generate`` takes it; None and ``Full()`` keep all. Lengths count all tokens
                seen. ``crop`` raises ValueError where it would need what has been evicted, or a sum
                of attention without the dropped tokens.
            max_prompt: beside a policy that evicts while decoding: most tokens of one call, for
                which there is room beyond what is kept; by default as many as the first call
                brings.

        Raises ValueError for another kv_dtype, layers of a type that pages do not hold, or a policy
        that rotates keys, which only ``effllm.generate`` can.
        """
        self.pages: PagedKVCache | None = None  # before anything raises: __del__ looks at it
        check_kv_dtype("PagedCache", kv_dtype)
        policy = cache_policy or Full()
        if policy.rotates:
            raise ValueError(
                "effllm: PagedCache cannot rotate keys, got a cache_policy with rotate=True; "
                "effllm.generate can"
            )
        self.cache_policy, self.max_prompt = policy, max_prompt
        self._seqs: list[int] = []  # one sequence of `pages` per batch row
        self.config = config.get_text_config(decoder=True)
        others = set(getattr(self.config, "layer_types", None) or ()) - {
            "full_attention",
            "sliding_attention",
        }
        if others:
            raise ValueError(f"effllm: PagedCache cannot hold layers of type {sorted(others)}")
        super().__init__(
            layers=[_PagedLayer(self, i) for i in range(self.config.num_hidden_layers)]
        )
        self.max_seq_len = max_seq_len
        self.max_batch = max_batch
        self.page_size = page_size
        self.kv_dtype = kv_dtype
        self._real = torch.ones(0, 0, dtype=torch.bool)  # [B, S]: which columns are tokens
        self._context: PagedContext | None = None  # of the current step
        self._waiting: int | None = None  # layer whose marked keys have not been appended yet

    @property
    def num_columns(self) -> int:
        """Columns seen, padding included: the length that transformers counts in."""
        return self._real.shape[1]

    def hand_on(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Marks the layer's new keys ``[B, HKV, S, D]`` for the attention that follows."""
        implementation = self.config._attn_implementation
        if implementation != "effllm":
            raise ValueError(
                "effllm: PagedCache needs attn_implementation='effllm', the model has "
                f"'{implementation}'"
            )
        if self._waiting is not None:
            raise RuntimeError(
                f"effllm: the keys of layer {self._waiting} never reached the attention of "
                "attn_implementation='effllm'; this model changes them after the cache"
            )
        self._waiting = layer
        key = key.view_as(key)  # a new tensor object: the mark must not stay on the caller's
        key.effllm_cache = (self, layer)  # type: ignore[attr-defined]
        return key, value

    def context(self, key: Tensor, mask: Tensor | None, layer: int) -> PagedContext:
        """The step that appends ``key`` ``[B, HKV, S, D]``; the first layer starts it.

        mask: bool ``[B, columns with the new ones]``, None when every column is a token.
        """
        self._waiting = None
        if layer == 0:
            self._start_step(key, mask)
        return cast(PagedContext, self._context)

    def _start_step(self, key: Tensor, mask: Tensor | None) -> None:
        rows, heads, columns, head_dim = key.shape
        if self.pages is None:
            shape, policy = (len(self.layers), heads, head_dim), self.cache_policy
            options: dict[str, Any] = {
                "max_batch": self.max_batch or rows,
                "max_seq_len": self.max_seq_len,
                "page_size": self.page_size,
                "dtype": key.dtype,
                "kv_dtype": self.kv_dtype,
                "device": key.device,
            }
            if policy.slots is None:
                self.pages = PagedKVCache(*shape, **options)
            else:
                if policy.decoding:  # a further prompt comes on top of what is kept
                    most = policy.slots + (self.max_prompt or columns)
                    options["max_seq_len"] = min(self.max_seq_len, most)
                self.pages = EvictingKVCache(policy, *shape, **options)
        if not self._seqs:
            self._seqs = [self.pages.add() for _ in range(rows)]
            self._real = torch.ones(rows, 0, dtype=torch.bool)
        seen = self.num_columns
        real = torch.ones(rows, seen + columns, dtype=torch.bool) if mask is None else mask.cpu()
        if rows != len(self._seqs) or not torch.equal(real[:, :seen], self._real):
            raise ValueError(
                f"effllm: the attention mask must repeat the columns already in the PagedCache "
                f"({len(self._seqs)} rows of {seen}, {self._real.sum(1).tolist()} of them tokens), "
                f"got {rows} rows with {real[:, :seen].sum(1).tolist()}"
            )
        counts = real[:, seen:].sum(1).tolist()
        # A row whose new columns are all padding takes no part in this step.
        try:
            batch = self.pages.step([(s, n) for s, n in zip(self._seqs, counts, strict=True) if n])
        except BaseException:
            if seen == 0:
                self.reset()  # the next call may bring another batch
            raise
        self._real = real
        self._context = PagedContext(self.pages, batch)

    def _take_rows(self, rows: list[int]) -> None:
        """Batch row i gets the content of row rows[i]; pages are shared, not copied."""
        if self.pages is None:
            return
        if len(rows) > self.pages.max_batch:
            raise ValueError(
                f"effllm: PagedCache has room for max_batch={self.pages.max_batch} sequences, got "
                f"{len(rows)}"
            )
        real = self._real[rows]  # first: an index out of range changes nothing
        taken = [self.pages.fork(self._seqs[row]) for row in rows]
        self._free_rows()
        self._seqs, self._real = taken, real

    def _free_rows(self) -> None:
        if self.pages is not None:
            for seq in self._seqs:
                self.pages.free(seq)
        self._seqs = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A cache with the same content in the same pages, which it continues on its own."""
        copy = PagedCache(
            self.config,
            max_seq_len=self.max_seq_len,
            max_batch=self.max_batch,
            page_size=self.page_size,
            kv_dtype=self.kv_dtype,
            cache_policy=self.cache_policy,
            max_prompt=self.max_prompt,
        )
        if self.pages is not None:
            copy.pages, copy._real = self.pages, self._real
            copy._seqs = [self.pages.fork(seq) for seq in self._seqs]
        return copy

    def __del__(self) -> None:
        self._free_rows()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take_rows(torch.arange(len(self._seqs))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows([row for row in range(len(self._seqs)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last ``-tokens_to_remove`` columns, as transformers' caches do."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"effllm: PagedCache.crop takes a negative number of tokens, got {tokens_to_remove}"
            )
        real = self._real[:, : max(0, self.num_columns + tokens_to_remove)]
        if self.pages is not None:
            rows = list(zip(self._seqs, real.sum(1).tolist(), strict=True))
            if isinstance(self.pages, EvictingKVCache):
                for seq, length in rows:  # first: a row that cannot changes nothing
                    self.pages.check_crop(seq, length)
            for seq, length in rows:
                self.pages.crop(seq, length)
        self._real = real

    def reset(self) -> None:
        """Forgets every sequence; the memory stays."""
        self._free_rows()
        self._context, self._waiting = None, None
        self._real = self._real.new_ones(0, 0)


class _PagedLayer(CacheLayerMixin):
    """What transformers asks of one layer; the state is the PagedCache's."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: PagedCache, layer: int) -> None:
        super().__init__()
        # Weak: a cycle would keep the pages of a dropped copy until the next garbage collection.
        self._cache = weakref.proxy(cache)
        self._layer = layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first step allocates all layers at once."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return cast(PagedCache, self._cache).hand_on(key_states, value_states, self._layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return cast(PagedCache, self._cache).num_columns

    def get_max_length(self) -> int:
        return cast(PagedCache, self._cache).max_seq_len
