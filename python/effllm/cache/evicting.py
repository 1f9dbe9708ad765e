"""A paged cache that forgets: it keeps as many tokens of a sequence as a policy says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import PagedBatch
from .eviction import Eviction, Slots
from .paged import PagedKVCache, _Sequence
from .policy import CachePolicy


class EvictingKVCache(PagedKVCache):
    """Keys and values of the tokens that a policy keeps, in pages.

    ``PagedContext`` does the work: it evicts as it attends. While decoding, a new token takes the
    slot of the one that is evicted and nothing is moved; a prompt is attended to as a whole, then
    what stays of it is moved together, and its other pages return to the pool. Each KV head of each
    layer keeps tokens of its own, all equally many, in its own rows of the sequence's pages. A
    token keeps its position, and the next one's is the number of tokens seen: ``length``.

    Differences to other paged caches: ``max_seq_len`` limits the slots in use, not the text. A
    sequence that has evicted offers no pages for reuse, and pages that others can see are copied
    before its first eviction. A prefix is reused only as far as the policy need not count its
    queries. All rows of a step decode, or none that must evict for it does. ``crop`` undoes steps
    back to the last eviction, and none of a policy whose scores are sums.
    """

    def __init__(
        self,
        policy: CachePolicy,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        inv_freq: Tensor | None = None,
        **options: Any,
    ) -> None:
        """``options`` are those of PagedKVCache. ``inv_freq`` [R / 2], fp32: how fast the model's
        rotary embedding turns, its halves paired; for policies that rotate.

        ValueError for a policy without a limit, or one that rotates without ``inv_freq`` or in a
        quantised cache.
        """
        if policy.slots is None:
            raise ValueError("EvictingKVCache: the policy must have a limit; else use PagedKVCache")
        if policy.rotates and (inv_freq is None or options.get("kv_dtype") is not None):
            raise ValueError(
                "EvictingKVCache: a policy that rotates keys needs inv_freq and a cache without "
                f"kv_dtype, got {options.get('kv_dtype')!r}"
            )
        super().__init__(num_layers, num_kv_heads, head_dim, **options)
        self.policy = policy
        self._inv_freq = inv_freq
        self._heads, self._head_dim = num_kv_heads, head_dim

    # ---- sequences -------------------------------------------------------------------------------

    def add(self, tokens: Sequence[int] = (), salt: str | bytes = b"") -> int:
        counted = self.policy.counts_prompt
        # At least 2, so that what is left is a prompt and can be fed beside others.
        computed = len(tokens) if counted is None else max(2, counted)
        return super().add(tokens[: max(0, len(tokens) - computed + 1)], salt)

    def evicted(self, seq_id: int) -> int:
        """Tokens of the sequence that each head has evicted; the others are in the cache."""
        return self._get(seq_id).evicted

    def check_crop(self, seq_id: int, length: int) -> None:
        """Raises the ValueError that ``crop`` would."""
        seq = self._on_device(seq_id)
        lossy = seq.length if self.policy.sums else seq.settled
        if 0 < length < lossy:
            raise ValueError(
                "EvictingKVCache.crop: what was evicted or counted cannot be taken back: length "
                f"must be 0 or at least {lossy}, got {length}"
            )

    def crop(self, seq_id: int, length: int, *, keep_pages: bool = False) -> None:
        self.check_crop(seq_id, length)
        seq = self._get(seq_id)
        if length == 0:
            # As if what is held were all that came: its pages can go.
            self._seqs[seq_id] = seq._replace(length=seq.held, evicted=0, settled=0, slots=None)
        super().crop(seq_id, length, keep_pages=keep_pages)

    def commit(self, seq_id: int, tokens: Sequence[int]) -> None:
        if not self._on_device(seq_id).evicted:
            super().commit(seq_id, tokens)

    def settle(self, seq_ids: Sequence[int]) -> None:
        """Gives up the pages that a prompt was evicted from; ``PagedContext`` calls it."""
        slots = self.policy.slots
        assert slots is not None
        for seq_id in seq_ids:
            seq = self._seqs[seq_id]
            keep = self._pages_for(max(slots, seq.reserved))
            self.pool.release(seq.pages[keep:])
            self._seqs[seq_id] = seq._replace(
                pages=seq.pages[:keep], evicted=seq.length - slots, settled=seq.length
            )

    # ---- steps -----------------------------------------------------------------------------------

    def reserve(self, seq_id: int, num_tokens: int, decode: int = 0) -> None:
        """Holds pages for a prompt of ``num_tokens`` and ``decode`` steps of one token after it."""
        seq, policy = self._get(seq_id), self.policy
        most = policy.needed(seq.held + num_tokens, decode)
        first = 0 if self._evicts(seq, num_tokens + decode) else seq.held
        self._reserve([(seq_id, max(0, most - seq.held), first)])
        left = policy.needed(min(seq.held + num_tokens, policy.slots or 0), decode)
        self._seqs[seq_id] = self._seqs[seq_id]._replace(reserved=left)

    def step(
        self,
        items: Sequence[tuple[int, int]],
        *,
        num_rows: int | None = None,
        num_tokens: int | None = None,
    ) -> PagedBatch:
        if num_rows is not None or num_tokens is not None:
            raise ValueError(
                "EvictingKVCache.step: num_rows and num_tokens must be None, there is no padding, "
                f"got {num_rows} and {num_tokens}"
            )
        before = {seq_id: self._on_device(seq_id) for seq_id, _ in items}
        counts = [n for _, n in items]
        evicts = [self._evicts(before[seq_id], n) for seq_id, n in items]
        decoding = max(counts, default=1) == 1
        self._check_mix(items, evicts, decoding)
        slots = self._joined(list(before.values())) if items and self.policy.decoding else None
        if decoding:
            for seq, (seq_id, _), evicting in zip(before.values(), items, evicts, strict=False):
                if evicting:  # the new token takes the slot of another one
                    self._seqs[seq_id] = seq._replace(
                        evicted=seq.evicted + 1, settled=seq.length + 1
                    )
        try:
            batch = super().step(items)
        except BaseException:
            for seq_id, seq in before.items():
                self._seqs[seq_id] = self._seqs[seq_id]._replace(
                    evicted=seq.evicted, settled=seq.settled
                )
            raise
        if slots is not None:
            for (seq_id, _), of_seq in zip(items, slots, strict=True):
                self._seqs[seq_id] = self._seqs[seq_id]._replace(slots=of_seq)
        if not items:
            return batch
        seq_ids = [seq_id for seq_id, _ in items]
        held = [seq.held for seq in before.values()]
        moves = [self._seqs[seq_id].evicted for seq_id in seq_ids]
        eviction = Eviction(
            cache=self,
            seq_ids=seq_ids,
            held=held,
            counts=counts,
            evicts=evicts,
            slots=None if slots is None else slots[0],
            used=self._to_device(torch.tensor(held, dtype=torch.int32)),
            moves=moves,
            turn=self._turn(moves) if self.policy.rotates and self.policy.n_sink else None,
        )
        return replace(batch, eviction=eviction)

    # ---- internals -------------------------------------------------------------------------------

    def _evicts(self, seq: _Sequence, num_tokens: int) -> bool:
        """Whether a step of so many tokens has to."""
        assert self.policy.slots is not None
        prompt = num_tokens > 1
        return (prompt or self.policy.decoding) and seq.held + num_tokens > self.policy.slots

    def _first_written(self, seq_id: int, num_tokens: int) -> int:
        seq = self._get(seq_id)
        # Any slot, if one is evicted: by this prompt, or for a token of which `step` has said so.
        anywhere = self._evicts(seq, num_tokens) or seq.settled > seq.length
        return 0 if anywhere else seq.held

    def _check_mix(
        self, items: Sequence[tuple[int, int]], evicts: list[bool], decoding: bool
    ) -> None:
        counts = [n for _, n in items]
        if decoding:
            return
        for (seq_id, n), evicting in zip(items, evicts, strict=True):
            if n == 1 and evicting:
                raise ValueError(
                    f"EvictingKVCache.step: sequence {seq_id} must evict to decode one token, "
                    f"which it cannot beside prompts; got token counts {counts}"
                )
        if self.policy.rotates and any(evicts):
            raise ValueError(
                "EvictingKVCache.step: a policy that rotates keys takes prompts up to "
                f"{self.policy.slots} tokens and then one at a time, got token counts {counts}"
            )

    def _joined(self, seqs: list[_Sequence]) -> list[Slots]:
        # Never inference tensors, as those of the cache.
        with torch.inference_mode(False), torch.no_grad():
            return Slots.join([seq.slots or self._new_slots() for seq in seqs])

    def _new_slots(self) -> Slots:
        """Slot i for position i, and no attention yet."""
        device = self.page_table.device
        slots = min(self.policy.slots or 0, self.page_table.shape[1] * self.page_size)
        shape = (self.num_layers, 1, self._heads, slots)
        positions = torch.arange(slots, dtype=torch.int32, device=device)
        sinks = None
        if self.policy.rotates:
            shape_of_keys = (*shape[:3], self.policy.n_sink, self._head_dim)
            sinks = torch.zeros(shape_of_keys, dtype=self.k[0].dtype, device=device)
        return Slots(
            torch.zeros(shape, device=device), positions.expand(shape).contiguous(), sinks, 0
        )

    def _snapshot(self, seq_id: int) -> _Sequence:
        seq = super()._snapshot(seq_id)
        with torch.inference_mode(False), torch.no_grad():
            return seq if seq.slots is None else seq._replace(slots=seq.slots.clone())

    def _turn(self, moves: list[int]) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the rows that move by so many positions."""
        moved = torch.tensor([move for move in moves if move], dtype=torch.float32)
        if not len(moved):
            return None
        assert self._inv_freq is not None
        angles = self._to_device(moved)[:, None] * self._to_device(self._inv_freq.float())
        return angles.cos(), angles.sin()

    def _to_device(self, host: Tensor) -> Tensor:
        return host.to(self.page_table.device, non_blocking=True)
