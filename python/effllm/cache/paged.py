"""The paged KV cache: device tensors, page table, and the sequences that live in them.

One model step, for any mix of prefill and decode:

    batch = cache.step([(seq_a, 1), (seq_b, 37)])       # pages for the new tokens, lengths advance
    for layer in range(cache.num_layers):               # inside the model
        k_cache, v_cache, k_scale, v_scale = cache.layer(layer)
        ops.kv_append(k, v, k_cache, v_cache, batch.slot_mapping, k_scale, v_scale)
        out, _ = ops.paged_attention(
            q, k_cache, v_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q,
            k_scale, v_scale, max_seqlen_q=batch.max_seqlen_q)
    cache.commit(seq_a, tokens_a)                       # optional: offer full pages for reuse

Tokens are packed without padding, in the order of the items. Dimensions: B rows of the step,
T new tokens, P page size, NP pages, MAXP pages per sequence, HKV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._host import BlockPool
from ..ops._kv_codes import QUANTIZED_KV, codes_per_row, empty_kv_scale
from .batch import PagedBatch, index_arrays, upload
from .swap import from_host, to_host

if TYPE_CHECKING:
    from .eviction import Slots


class _Sequence(NamedTuple):
    """Host state of one sequence. Immutable, so that a fork or a failed call cannot alias it. Each
    step replaces that of all its sequences: a frozen dataclass would take twice as long for it."""

    pages: tuple[int, ...] = ()
    length: int = 0  # tokens seen: the position of the next one
    committed: int = 0  # leading pages that this sequence has offered for reuse
    salt: str | bytes = b""
    # The content while it is swapped out, one tensor per cache; there are no pages then.
    host: tuple[Tensor, ...] = ()
    # Of caches that evict (evicting.py):
    evicted: int = 0  # tokens seen that each head has no slot for any more
    settled: int = 0  # tokens seen when that was last so; behind it slots are in order
    reserved: int = 0  # slots that stay reserved when a prompt is evicted
    slots: Slots | None = None

    @property
    def held(self) -> int:
        """Slots in use, of each head: those of the tokens in the cache."""
        return self.length - self.evicted


def check_kv_dtype(owner: str, kv_dtype: str | None) -> None:
    """Raises ValueError for a name that no quantised cache has."""
    if kv_dtype is not None and kv_dtype not in QUANTIZED_KV:
        raise ValueError(f"{owner}: kv_dtype must be e4m3, int8, int4 or None, got {kv_dtype!r}")


class PagedKVCache:
    """Keys and values of many sequences in pages of P tokens, one K and one V tensor per layer.

    Sequences are named by an int that is never reused. All bookkeeping is on the host; the device
    only sees `page_table` and `seq_lens`, which keep their addresses for life (CUDA graphs).
    Pages are shared between sequences through prefix reuse and `fork`, and copied when a sequence
    appends to a page that somebody else can see. A sequence that waits can be swapped out to host
    memory. A call that fails changes nothing.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_batch: int,
        max_seq_len: int,
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates everything at once.

        `max_batch`: most rows of one step (more sequences may live in the cache). `max_seq_len`:
        most tokens of one sequence, MAXP = ceil(max_seq_len / P). `num_pages`: NP, the reserved
        page 0 included; the default holds max_batch sequences of max_seq_len. `dtype`: of the keys
        and values that come, bfloat16, float16 or float32, and of what is kept of them, unless
        `kv_dtype` is "e4m3", "int8" or "int4": then they are kept in 8 or 4 bits, with a scale of
        4 bytes per token, head and layer for each of K and V.

        ValueError for a size below 1, an odd head_dim in int4, or another dtype.
        """
        sizes = (num_layers, num_kv_heads, head_dim, max_batch, max_seq_len, page_size)
        if min(sizes) < 1:
            raise ValueError(
                "PagedKVCache: num_layers, num_kv_heads, head_dim, max_batch, max_seq_len and "
                f"page_size must be at least 1, got {sizes}"
            )
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"PagedKVCache: dtype must be bf16, fp16 or fp32, got {dtype}")
        check_kv_dtype("PagedKVCache", kv_dtype)
        if kv_dtype == "int4" and head_dim % 2:
            raise ValueError(f"PagedKVCache: int4 needs an even head_dim, got {head_dim}")
        self.num_layers = num_layers
        self.page_size = page_size
        self.max_batch = max_batch
        self.max_seq_len = max_seq_len
        max_pages = self._pages_for(max_seq_len)
        if num_pages is None:
            num_pages = 1 + max_batch * max_pages
        self.pool = BlockPool(num_pages, page_size)

        cache_dtype = dtype if kv_dtype is None else QUANTIZED_KV[kv_dtype]

        def tensors() -> list[Tensor]:
            # Physically [NP, HKV, P, D]: the rows of one head in one page are contiguous.
            row = codes_per_row(head_dim, cache_dtype)
            shape = (num_pages, num_kv_heads, page_size, row)
            empty = [
                torch.empty(shape, dtype=cache_dtype, device=device) for _ in range(num_layers)
            ]
            return [tensor.transpose(1, 2) for tensor in empty]

        def scales() -> list[Tensor]:
            sizes = (num_pages, num_kv_heads, page_size)
            layers = 0 if kv_dtype is None else num_layers
            return [empty_kv_scale(*sizes, cache_dtype, device) for _ in range(layers)]

        # Never inference tensors, even under inference_mode: those could not be written outside.
        with torch.inference_mode(False):
            self.k, self.v = tensors(), tensors()  # per layer, logical [NP, P, HKV, D]
            self.k_scale, self.v_scale = scales(), scales()  # of quantised caches, [NP, P, HKV, ..]
            self.page_table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)
            self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._host_table = np.zeros((max_batch, max_pages), dtype=np.int32)
        self._row_pages: list[tuple[int, ...]] = [()] * max_batch  # what each table row shows
        self._seqs: dict[int, _Sequence] = {}
        self._next_id = 0

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the ops take of one layer: k_cache, v_cache, k_scale and v_scale."""
        k_scale = self.k_scale[index] if self.k_scale else None
        v_scale = self.v_scale[index] if self.v_scale else None
        return self.k[index], self.v[index], k_scale, v_scale

    # ---- sequences -------------------------------------------------------------------------------

    def add(self, tokens: Sequence[int] = (), salt: str | bytes = b"") -> int:
        """A new sequence; returns its id.

        Full pages of an earlier sequence with the same leading `tokens` and `salt` are reused:
        `length(seq)` tells how many tokens the cache already holds, and the first step feeds
        `tokens[length(seq):]`. The last token is never taken from the cache, because its logits
        must be computed. Needs no free page.
        """
        pages = self.pool.match_prefix(tokens[:-1], salt)
        return self._insert(_Sequence(tuple(pages), len(pages) * self.page_size, len(pages), salt))

    def length(self, seq_id: int) -> int:
        """Tokens of the sequence that are in the cache."""
        return self._get(seq_id).length

    def pages(self, seq_id: int) -> tuple[int, ...]:
        """Pages of the sequence in order, reserved ones included; none while it is swapped out."""
        return self._get(seq_id).pages

    def free(self, seq_id: int) -> None:
        """Ends a sequence; its committed pages stay findable until they are needed."""
        self.pool.release(self._get(seq_id).pages)
        del self._seqs[seq_id]

    def fork(self, seq_id: int) -> int:
        """A second sequence with the same content; all pages are shared, none is copied yet."""
        seq = self._snapshot(seq_id)
        self.pool.retain(seq.pages)
        return self._insert(seq)

    def reorder(self, seq_ids: Sequence[int], source: Sequence[int]) -> None:
        """Beam search: sequence `seq_ids[i]` gets the content that `seq_ids[source[i]]` had."""
        n = len(seq_ids)
        if len(set(seq_ids)) < n or len(source) != n or not all(0 <= i < n for i in source):
            raise ValueError(
                f"PagedKVCache.reorder: needs distinct sequences and as many indices below {n}, "
                f"got {list(seq_ids)} and {list(source)}"
            )
        old = [self._on_device(seq_id) for seq_id in seq_ids]
        new = [self._snapshot(seq_ids[i]) for i in source]
        # Retain first: a page dropped by one sequence may be taken over by another.
        self.pool.retain([page for seq in new for page in seq.pages])
        self._seqs.update(zip(seq_ids, new, strict=True))
        for seq in old:
            self.pool.release(seq.pages)

    def crop(self, seq_id: int, length: int, *, keep_pages: bool = False) -> None:
        """Keeps the first `length` tokens; undoes steps, for example rejected draft tokens.

        Pages past the new length go back to the pool, reserved ones included; with `keep_pages`
        those stay reserved that nobody else can see.
        """
        seq = self._on_device(seq_id)
        if not 0 <= length <= seq.length:
            raise ValueError(
                f"PagedKVCache.crop: length must be in [0, {seq.length}], got {length}"
            )
        keep = self._pages_for(length - seq.evicted)
        if keep_pages:
            used = self._pages_for(seq.held)
            while keep < used and not self._is_visible(seq.pages[keep]):
                keep += 1
            if keep == used:  # those behind have one owner by design
                keep = len(seq.pages)
        self.pool.release(seq.pages[keep:])
        self._seqs[seq_id] = seq._replace(
            pages=seq.pages[:keep],
            length=length,
            committed=min(seq.committed, length // self.page_size),
        )

    def commit(self, seq_id: int, tokens: Sequence[int]) -> None:
        """Offers the sequence's full pages for prefix reuse by a later `add`.

        `tokens`: the sequence's tokens from position 0, at least those of its full pages. Call it
        after the kernels that write these pages were launched on the stream that will read them.
        Costs nothing when no new page is full.
        """
        seq, size = self._on_device(seq_id), self.page_size
        full = seq.length // size
        if len(tokens) < full * size:
            raise ValueError(
                f"PagedKVCache.commit: needs the {full * size} tokens of {full} full pages, "
                f"got {len(tokens)}"
            )
        for i in range(seq.committed, full):
            parent = seq.pages[i - 1] if i else 0
            self.pool.commit(seq.pages[i], tokens[i * size : (i + 1) * size], parent, seq.salt)
        self._seqs[seq_id] = seq._replace(committed=full)

    def swap_out(self, seq_id: int) -> None:
        """Moves the sequence to host memory and gives up its pages, reserved ones too.

        It keeps id and length; until `swap_in` it can only be asked for these, and freed. Pages
        that it shares are copied as well: others keep them, and they stay findable as prefixes.
        From a GPU nothing is waited for; use one stream for steps and swaps. Does nothing if it is
        out.
        """
        seq = self._get(seq_id)
        if seq.host:
            return
        content = seq.pages[: self._pages_for(seq.held)]
        host = to_host(self._caches, content) if content else ()
        self._seqs[seq_id] = seq._replace(pages=(), committed=0, host=host)
        self.pool.release(seq.pages)

    def swap_in(self, seq_id: int) -> None:
        """Brings a sequence back into pages of its own. Does nothing if it is in.

        OutOfPages when the pool has too few; the sequence then stays in host memory.
        """
        seq = self._get(seq_id)
        if not seq.host:
            return
        pages = self.pool.allocate(self._pages_for(seq.held))
        try:
            from_host(seq.host, self._caches, pages)
        except BaseException:
            self.pool.release(pages)
            raise
        self._seqs[seq_id] = seq._replace(pages=tuple(pages), host=())

    def is_swapped_out(self, seq_id: int) -> bool:
        """Whether the sequence is in host memory."""
        return bool(self._get(seq_id).host)

    def reset(self) -> None:
        """Drops every sequence and every reusable page, as after a change of the weights."""
        self.pool.reset()
        self._seqs.clear()

    # ---- steps -----------------------------------------------------------------------------------

    def reserve(self, seq_id: int, num_tokens: int, decode: int = 0) -> None:
        """Holds pages for the next `num_tokens` tokens, and for as many as `decode` after them that
        come one by one, so that later steps cannot run out.

        OutOfPages when the pool has too few, ValueError past max_seq_len.
        """
        self._reserve([(seq_id, num_tokens + decode, self._get(seq_id).held)])

    def step(
        self,
        items: Sequence[tuple[int, int]],
        *,
        num_rows: int | None = None,
        num_tokens: int | None = None,
    ) -> PagedBatch:
        """Makes room for n >= 1 new tokens of each (seq_id, n) in `items`, in this order.

        Lengths advance at once: the caller now computes these tokens, or takes them back with
        `crop`. `num_rows` and `num_tokens` pad the step to fixed sizes (CUDA graphs): rows of no
        tokens with seq_len 0, and tokens of no row, at position 0 with slot -1.

        OutOfPages when the pool has too few pages for the whole step; ValueError for a repeated
        sequence, a bad count, or a sequence past max_seq_len; IndexError for an unknown sequence.
        """
        counts = [n for _, n in items]
        rows = len(items) if num_rows is None else num_rows
        total = sum(counts)
        padded = total if num_tokens is None else num_tokens
        problem = None
        if not len(items) <= rows <= self.max_batch:
            problem = f"rows must be in [{len(items)}, max_batch={self.max_batch}], got {rows}"
        elif min(counts, default=1) < 1:
            problem = f"token counts must be at least 1, got {counts}"
        elif padded < total:
            problem = f"num_tokens must be at least {total}, got {padded}"
        elif len({seq_id for seq_id, _ in items}) < len(items):
            problem = f"a sequence repeats in {list(items)}"
        if problem:
            raise ValueError(f"PagedKVCache.step: {problem}")
        self._reserve([(seq_id, n, self._first_written(seq_id, n)) for seq_id, n in items])

        starts = [self._seqs[seq_id].held for seq_id, _ in items]
        padding = rows - len(items)
        self._write_rows([self._seqs[seq_id].pages for seq_id, _ in items] + [()] * padding)
        evicted = [self._seqs[seq_id].evicted for seq_id, _ in items]
        seq_lens, *rest = index_arrays(
            self._host_table, self.page_size, starts, counts, evicted, rows, padded
        )
        self.seq_lens[:rows].copy_(torch.from_numpy(seq_lens), non_blocking=True)
        cu_seqlens_q, slot_mapping, positions = upload(rest, self.seq_lens.device)
        for seq_id, n in items:  # last: what came before may have run out of device memory
            seq = self._seqs[seq_id]
            self._seqs[seq_id] = seq._replace(length=seq.length + n)
        return PagedBatch(
            page_table=self.page_table[:rows],
            seq_lens=self.seq_lens[:rows],
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max(counts, default=0),
            num_tokens=total,
            slot_mapping=slot_mapping,
            positions=positions,
        )

    def move_path(self, batch: PagedBatch, accept_index: Tensor, num_accepted: Tensor) -> None:
        """Moves the tokens that `ops.tree_verify` accepted to the front of those of a step.

        `batch`: of the last step, whose tokens were one tree of each sequence; `accept_index` int32
        [B, W] and `num_accepted` int32 [B] as verified, without padding rows. Lengths stay until
        `crop` is called.
        """
        rows = len(num_accepted)
        first = batch.seq_lens[:rows] - batch.cu_seqlens_q[: rows + 1].diff()
        ops.kv_compact(self._caches, batch.page_table[:rows], first, accept_index, num_accepted)

    # ---- internals -------------------------------------------------------------------------------

    def _get(self, seq_id: int) -> _Sequence:
        if seq_id not in self._seqs:
            raise IndexError(f"PagedKVCache: no sequence {seq_id}")
        return self._seqs[seq_id]

    def _on_device(self, seq_id: int) -> _Sequence:
        seq = self._get(seq_id)
        if seq.host:
            raise ValueError(f"PagedKVCache: sequence {seq_id} is swapped out: swap_in comes first")
        return seq

    def _is_visible(self, page: int) -> bool:
        """Whether others than one holder can see the page."""
        return self.pool.ref_count(page) > 1 or self.pool.is_committed(page)

    @property
    def _caches(self) -> list[Tensor]:
        """All tensors that hold a page's content, pages first."""
        return [*self.k, *self.v, *self.k_scale, *self.v_scale]

    def _insert(self, seq: _Sequence) -> int:
        seq_id = self._next_id
        self._next_id += 1
        self._seqs[seq_id] = seq
        return seq_id

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _snapshot(self, seq_id: int) -> _Sequence:
        """The sequence without reserved pages: those have one owner by design."""
        seq = self._on_device(seq_id)
        return seq._replace(pages=seq.pages[: self._pages_for(seq.held)])

    def _first_written(self, seq_id: int, num_tokens: int) -> int:
        """The first slot that a step of so many tokens writes."""
        return self._get(seq_id).held

    def _reserve(self, items: Sequence[tuple[int, int, int]]) -> None:
        """Makes the next n tokens of each (seq_id, n, first slot to be written) writable, or raises
        and changes nothing."""
        # Plan. Filled or partly filled pages that others can see are copied: committed ones, and
        # those with other holders. Of several writers in one step, the last holder left keeps them.
        holders: dict[int, int] = {}
        plan: list[tuple[int, list[int], int]] = []  # (seq_id, which pages to copy, how many more)
        for seq_id, n, first in items:
            seq = self._on_device(seq_id)
            held = seq.held
            if n < 0 or held + n > self.max_seq_len:
                raise ValueError(
                    f"PagedKVCache: sequence {seq_id} has {held} tokens, cannot add {n}: "
                    f"max_seq_len is {self.max_seq_len}"
                )
            shared = []
            for index in range(first // self.page_size, self._pages_for(held) if n else 0):
                page = seq.pages[index]
                left = holders.setdefault(page, self.pool.ref_count(page))
                if left > 1 or self.pool.is_committed(page):
                    shared.append(index)
                    holders[page] = left - 1
            grow = max(0, self._pages_for(held + n) - len(seq.pages))
            plan.append((seq_id, shared, grow))
        taken = self.pool.allocate(sum(len(shared) + grow for _, shared, grow in plan))

        fresh = iter(taken)
        moves: list[tuple[int, int]] = []  # (page, its copy)
        new: dict[int, _Sequence] = {}
        for seq_id, shared, grow in plan:
            if not shared and not grow:
                continue
            seq = self._seqs[seq_id]
            pages = list(seq.pages)
            for index in shared:
                moves.append((pages[index], next(fresh)))
                pages[index] = moves[-1][1]
            pages += [next(fresh) for _ in range(grow)]
            new[seq_id] = seq._replace(pages=tuple(pages))
        if moves:
            try:
                pairs = torch.tensor(moves).T.contiguous()
                src, dst = pairs.to(self.page_table.device, non_blocking=True)
                ops.block_copy(self._caches, src, dst)
            except BaseException:
                self.pool.release(taken)
                raise
        self._seqs.update(new)
        self.pool.release([page for page, _ in moves])

    def _write_rows(self, rows: list[tuple[int, ...]]) -> None:
        """Shows these sequences in the page table; only rows that changed are sent."""
        # `is` suffices: a sequence's tuple is replaced whenever its pages change.
        dirty = [b for b, pages in enumerate(rows) if self._row_pages[b] is not pages]
        for b in dirty:
            self._row_pages[b] = rows[b]
            self._host_table[b] = 0
            self._host_table[b, : len(rows[b])] = rows[b]
        if dirty:
            changed = slice(dirty[0], dirty[-1] + 1)
            host = torch.from_numpy(self._host_table[changed])
            self.page_table[changed].copy_(host, non_blocking=True)
