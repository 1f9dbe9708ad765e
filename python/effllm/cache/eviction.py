"""The attention of one step of a cache that evicts: what PagedContext hands on to.

Dimensions: L layers, B rows of the step, T new tokens, P page size, HKV heads, N slots in use, S
slots that a policy keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops._kv_codes import as_bits
from .batch import PagedBatch

if TYPE_CHECKING:
    from .evicting import EvictingKVCache


@dataclass(frozen=True)
class Slots:
    """Scores and positions of the tokens in the slots of a step's sequences, one of which is
    ``row``. Sequences that step together share the tensors, so that no step gathers them."""

    scores: Tensor  # fp32 [L, B, HKV, S]
    positions: Tensor  # int32 [L, B, HKV, S]
    sinks: Tensor | None  # [L, B, HKV, n_sink, D]; of policies that rotate: keys as they came
    row: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that there are."""
        both = (self.scores, self.positions)
        return both if self.sinks is None else (*both, self.sinks)

    def clone(self) -> Slots:
        """A copy of the row, alone."""
        rows = [t[:, self.row : self.row + 1].clone() for t in self.tensors()]
        return Slots(rows[0], rows[1], rows[2] if len(rows) > 2 else None, 0)

    @staticmethod
    def join(parts: list[Slots]) -> list[Slots]:
        """The same rows in tensors of their own, in this order; as they are if they are that."""
        first = parts[0]
        if first.scores.shape[1] == len(parts) and all(
            part.scores is first.scores and part.row == row for row, part in enumerate(parts)
        ):
            return parts
        columns = zip(*(part.tensors() for part in parts), strict=True)
        joined = [
            torch.stack([t[:, part.row] for t, part in zip(column, parts, strict=True)], 1)
            for column in columns
        ]
        whole = Slots(joined[0], joined[1], joined[2] if len(joined) > 2 else None, 0)
        return [replace(whole, row=row) for row in range(len(parts))]


@dataclass(frozen=True)
class _LayerStep:
    """What a layer brings, and how it attends."""

    batch: PagedBatch
    layer: int
    q: Tensor  # [T, HQ, D]
    k: Tensor  # [T, HKV, D]
    v: Tensor
    sinks: Tensor | None  # fp32 [HQ]
    options: dict[str, Any]


@dataclass(frozen=True)
class Eviction:
    """What a step evicts. A prompt is attended to as a whole, then evicted from; a step of one
    token of each row first makes room for it, so that it sees as many keys as are kept."""

    cache: EvictingKVCache
    seq_ids: list[int]
    held: list[int]  # slots in use before the step, of each row
    counts: list[int]  # new tokens of each row
    evicts: list[bool]  # whether each row has to
    slots: Slots | None  # of all rows; None if the policy does nothing while decoding
    used: Tensor  # int32 [B]: held, on the device
    moves: list[int]  # how many positions the sinks of each row have to move up
    turn: tuple[Tensor, Tensor] | None  # cos and sin [R, D / 2] of those of the R rows that move

    @property
    def is_decoding(self) -> bool:
        return max(self.counts) == 1

    def check(self, window: int | None, given: dict[str, Any]) -> None:
        """ValueError for what attention cannot do in a cache that evicts."""
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"EvictingKVCache: attention cannot have {name}, got {value}")
        longest = max(self.cache.length(seq_id) for seq_id in self.seq_ids)
        if window is not None and window < longest:
            raise ValueError(
                "EvictingKVCache: layers must see all keys that are kept, got a sliding window of "
                f"{window} tokens at length {longest}"
            )

    def attend(
        self,
        batch: PagedBatch,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Appends k, v [T, HKV, D] and attends q [T, HQ, D] to what is kept; as PagedContext."""
        sinks = None if sinks is None else sinks.float()
        step = _LayerStep(batch, layer, q, k, v, sinks, {"scale": scale, "softcap": softcap})
        decodes = self.is_decoding and self.slots is not None
        return self._decode(step) if decodes else self._extend(step)

    def _decode(self, step: _LayerStep) -> Tensor:
        assert self.slots is not None
        policy, batch, layer = self.cache.policy, step.batch, step.layer
        scores, positions = self.slots.scores[layer], self.slots.positions[layer]
        k_cache, v_cache, k_scale, v_scale = self.cache.layer(layer)
        heads = step.k.shape[1]
        # All heads of a sequence use equally many slots, in their own rows of the same pages.
        ops.h2o_append(
            step.k,
            step.v,
            k_cache,
            v_cache,
            scores,
            positions,
            self.used[:, None].repeat(1, heads),
            batch.page_table[:, None].expand(-1, heads, -1),
            batch.positions,
            k_scale,
            v_scale,
            recent=policy.protected,
            n_sink=policy.n_sink,
            normalize=policy.normalize,
        )
        if self.slots.sinks is not None:
            self._rotate_sinks(batch, layer, self.slots.sinks[layer])
        if not policy.counts_decoding:
            return self._attention(step)[0]
        if not policy.sums:
            scores.zero_()
        out, _ = ops.h2o_attention(
            step.q,
            k_cache,
            v_cache,
            scores,
            batch.page_table,
            batch.seq_lens,
            k_scale,
            v_scale,
            step.sinks,
            **step.options,
        )
        if not policy.sums:
            scores.copy_(policy.of_step(scores))
        return out

    def _extend(self, step: _LayerStep) -> Tensor:
        """Prompts: all tokens in the order of the text, attention, and what stays of them."""
        policy, batch, layer = self.cache.policy, step.batch, step.layer
        rows = range(len(self.seq_ids))
        totals = [held + n for held, n in zip(self.held, self.counts, strict=True)]
        if self.slots is not None:
            for row in rows:
                if self.evicts[row] and self.held[row]:
                    self._sort(batch, layer, row, self.slots)
        k_cache, v_cache, k_scale, v_scale = self.cache.layer(layer)
        ops.kv_append(step.k, step.v, k_cache, v_cache, batch.slot_mapping, k_scale, v_scale)
        if any(self.evicts) and policy.prompt_window is not None:
            seen = {"window": policy.prompt_window, "sink_tokens": policy.n_sink}
        else:
            seen = {}
        out, lse = self._attention(step, **seen)
        if self.slots is None and not any(self.evicts):
            return out

        longest = max(totals)
        if policy.counts_prompt == 0:
            shape = (len(rows), step.k.shape[1], longest)
            weights = step.q.new_zeros(shape, dtype=torch.float32)
        else:
            weights = ops.attn_colsum(
                step.q,
                k_cache,
                batch.page_table,
                batch.seq_lens,
                batch.cu_seqlens_q,
                lse,
                k_scale,
                step.sinks,
                max_seqlen_k=longest,
                last_n=policy.counts_prompt,
                **step.options,
            )
        for row in rows if self.slots is not None else [r for r in rows if self.evicts[r]]:
            self._evict(batch, layer, row, weights[row, :, : totals[row]])
        if layer == self.cache.num_layers - 1:
            evicting = zip(self.seq_ids, self.evicts, strict=True)
            self.cache.settle([seq_id for seq_id, has_to in evicting if has_to])
        return out

    def _attention(self, step: _LayerStep, **seen: Any) -> tuple[Tensor, Tensor]:
        layer = self.cache.layer(step.layer)
        return step.batch.attention(step.q, layer, step.sinks, **step.options, **seen)

    def _evict(self, batch: PagedBatch, layer: int, row: int, weights: Tensor) -> None:
        """After a prompt: adds its weights [HKV, N] to the scores, keeps what the policy says."""
        policy, slots = self.cache.policy, self.slots
        heads, total = weights.shape
        held, n = self.held[row], self.counts[row]
        scores = policy.of_step(weights)
        if slots is None:  # slots are in the order of positions
            positions = torch.arange(total, dtype=torch.int32, device=scores.device)
            positions = positions.expand(heads, -1)
        else:
            if policy.sums:
                scores = scores.clone()
                scores[:, :held] += slots.scores[layer, row, :, :held]
            length = self.cache.length(self.seq_ids[row])
            new = torch.arange(length - n, length, dtype=torch.int32, device=scores.device)
            old = slots.positions[layer, row, :, :held]
            positions = torch.cat([old, new.expand(heads, -1)], 1)
        if self.evicts[row]:
            kept = policy.kept(positions, scores)
            self._move(batch, layer, row, kept)
            scores, positions = scores.gather(1, kept), positions.gather(1, kept)
        if slots is not None:
            slots.scores[layer, row, :, : scores.shape[1]] = scores
            slots.positions[layer, row, :, : scores.shape[1]] = positions

    def _sort(self, batch: PagedBatch, layer: int, row: int, slots: Slots) -> None:
        """Brings the slots in use into the order of positions, as attention to a prompt needs."""
        held = self.held[row]
        order = slots.positions[layer, row, :, :held].argsort(-1)
        self._move(batch, layer, row, order)
        for of_slots in (slots.scores, slots.positions):
            of_row = of_slots[layer, row, :, :held]
            of_row.copy_(of_row.gather(1, order))

    def _move(self, batch: PagedBatch, layer: int, row: int, source: Tensor) -> None:
        """Slot i of each head gets the content of slot source[head, i], int64 [HKV, N]."""
        size, table = self.cache.page_size, batch.page_table[row].long()
        head = torch.arange(len(source), device=source.device)[:, None]
        target = torch.arange(source.shape[1], device=source.device).expand_as(source)
        for cache in self.cache.layer(layer):
            if cache is not None:
                bits = as_bits(cache)
                rows = bits[table[source // size], source % size, head]
                bits[table[target // size], target % size, head] = rows

    def _rotate_sinks(self, batch: PagedBatch, layer: int, kept: Tensor) -> None:
        """Moves the sinks by as many positions as tokens were evicted. From the keys as they came,
        kept [B, HKV, n_sink, D]: to rotate rotated ones again would round them at each step."""
        cos, sin = self.turn if self.turn is not None else (None, None)
        rows = [row for row, move in enumerate(self.moves) if move]
        if cos is None or sin is None:
            return
        k_cache, _, _, _ = self.cache.layer(layer)
        size, count = self.cache.page_size, kept.shape[2]
        slot = torch.arange(count, device=kept.device)
        pages = batch.page_table[rows].long()[:, slot // size]  # [R, n_sink]
        for i, row in enumerate(rows):
            if self.moves[row] == 1:  # the first eviction: they stand where they came
                kept[row] = k_cache[pages[i], slot % size].transpose(0, 1)
        keys = kept[rows].transpose(1, 2).flatten(0, 1)  # [R * n_sink, HKV, D]
        turned = ops.rope_kv_append(
            keys,
            keys,
            keys,
            cos,
            sin,
            torch.arange(len(rows), device=keys.device).repeat_interleave(count),
            k_cache,
            k_cache,
            torch.full((len(keys),), -1, device=keys.device),  # nothing is appended
        )
        k_cache[pages.flatten(), (slot % size).repeat(len(rows))] = turned
