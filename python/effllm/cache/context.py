"""What one step's attention needs: the cache and which of its slots this step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .batch import PagedBatch
from .paged import PagedKVCache


@dataclass(frozen=True)
class PagedContext:
    """The model keyword ``effllm=``: ``model(ids, effllm=PagedContext(cache, batch))``.

    Dimensions: T tokens of the step in packed order, HQ and HKV heads, D head dim.
    """

    cache: PagedKVCache
    batch: PagedBatch

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float = 0.0,
        split_size: int | None = None,
        sink_tokens: int = 0,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
    ) -> Tensor:
        """Appends k, v ``[T, HKV, D]`` to the layer's pages and attends q ``[T, HQ, D]`` to them.

        Causal, along the branches of a batch with trees. ``scale`` defaults to D ** -0.5,
        ``window`` counts the keys seen including the token's own, behind the first ``sink_tokens``,
        which stay visible; ``softcap`` 0 is off; ``sinks`` ``[HQ]`` are logits that take part in
        the softmax without a value, ``alibi_slopes`` ``[HQ]`` times the distance is taken from
        scores, both in any float dtype; a ``split_size`` makes bits independent of the batch. With
        ``rotary``, (cos, sin) as ``ops.rope_kv_append`` takes them, q and k are first rotated by
        their positions, in the launch that appends. Returns ``[T, HQ, D]``.
        """
        batch = self.batch
        if batch.eviction is not None:
            given = {"split_size": split_size, "alibi_slopes": alibi_slopes, "rotary": rotary}
            batch.eviction.check(window, given | {"sink_tokens": sink_tokens or None})
            k, v = k.detach(), v.detach()
            return batch.eviction.attend(batch, layer, q, k, v, scale, softcap, sinks)
        k_cache, v_cache, k_scale, v_scale = self.cache.layer(layer)
        # Cached keys carry no gradient. Nothing gets lost: the backward of attention raises.
        k, v = k.detach(), v.detach()
        slots = batch.slot_mapping
        if rotary is None:
            ops.kv_append(k, v, k_cache, v_cache, slots, k_scale, v_scale)
        else:
            cos, sin = rotary
            q = ops.rope_kv_append(
                q,
                k,
                v,
                cos,
                sin,
                batch.positions,
                k_cache,
                v_cache,
                slots,
                k_scale,
                v_scale,
                interleaved=interleaved,
            )
        out, _ = batch.attention(
            q,
            self.cache.layer(layer),
            None if sinks is None else sinks.float(),
            None if alibi_slopes is None else alibi_slopes.float(),
            scale=scale,
            window=window,
            softcap=softcap,
            split_size=split_size,
            sink_tokens=sink_tokens,
        )
        return out
