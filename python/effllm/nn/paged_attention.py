"""PagedAttention: the attention of a layer over a paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from effllm.cache import PagedContext

# What paged_attention takes.
_HEAD_DIM_STEP, _MAX_HEAD_DIM = 8, 256


class PagedAttention(nn.Module):
    """Causal attention between q and k, v projections and the output projection.

    Appends the new keys and values to the pages of a layer, then attends to all of the sequence.
    It holds no tensors, only numbers: one instance may serve all layers. ``num_kv_heads`` makes it
    multi-head (equal to ``num_heads``), multi-query (1) or grouped-query attention; query head h
    reads KV head h // (num_heads // num_kv_heads). Rotary embedding is the caller's or,
    given ``rotary``, part of the append.

        attention = effllm.nn.PagedAttention(32, 8, 128)
        batch = cache.step([(seq, n) ...])                   # effllm.cache.PagedKVCache
        context = PagedContext(cache, batch)                 # effllm.cache
        out = o_proj(attention(q_proj(x), k_proj(x), v_proj(x), context, layer=0))
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float = 0.0,
        split_size: int | None = None,
        sink_tokens: int = 0,
        interleaved: bool = False,
    ) -> None:
        """``scale`` None is head_dim ** -0.5; ``window`` counts the keys that a token sees, its own
        included, None is all; ``softcap`` c > 0 turns a score s into c * tanh(s / c);
        ``split_size``, a multiple of 64, makes the bits of a token independent of the batch that
        it is in (``effllm.ops.paged_attention``); ``sink_tokens`` of a sequence stay visible, the
        first ones, when the window has left them behind (StreamingLLM); ``interleaved`` is how
        ``rotary`` pairs the elements of a head, as ``ops.rope_kv_append`` says.

        ValueError for heads that form no groups, a head dim that is no multiple of 8 up to 256, or
        a window below 1.
        """
        super().__init__()
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "PagedAttention: num_heads must be a positive multiple of num_kv_heads, got "
                f"{num_heads} and {num_kv_heads}"
            )
        if head_dim not in range(_HEAD_DIM_STEP, _MAX_HEAD_DIM + 1, _HEAD_DIM_STEP):
            raise ValueError(
                f"PagedAttention: head_dim must be a multiple of {_HEAD_DIM_STEP} up to "
                f"{_MAX_HEAD_DIM}, got {head_dim}"
            )
        if window is not None and window < 1:
            raise ValueError(f"PagedAttention: window must be at least 1 or None, got {window}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.split_size = split_size
        self.sink_tokens = sink_tokens
        self.interleaved = interleaved

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: PagedContext,
        layer: int,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The attention of the T new tokens of a step, packed in the order of its items.

        Args:
            q: ``[..., HQ * D]`` or ``[..., HQ, D]`` with T tokens in the leading dimensions.
            k, v: the same with HKV heads; slices of a packed qkv projection are not copied.
            context: the cache and its current step.
            layer: whose pages.
            sinks: ``[HQ]``, any float dtype: a logit per head that takes part in the softmax and
                has no value (gpt-oss).
            alibi_slopes: ``[HQ]``, any float dtype: how much less a score is for each position
                between token and key (ALiBi).
            rotary: cos and sin, fp32 ``[MAXPOS, R / 2]``: q and k come as projected, and the first
                R elements of their heads are rotated by the positions of the step.

        Returns:
            In the shape of q. Inference only: the backward pass raises.

        Raises:
            ValueError: a tensor without these heads. RuntimeError: as the ops say.
        """
        out = context.attend(
            layer,
            self._heads("q", q, self.num_heads),
            self._heads("k", k, self.num_kv_heads),
            self._heads("v", v, self.num_kv_heads),
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            split_size=self.split_size,
            sink_tokens=self.sink_tokens,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            rotary=rotary,
            interleaved=self.interleaved,
        )
        return out.view(q.shape)

    def _heads(self, name: str, x: Tensor, heads: int) -> Tensor:
        """As [T, heads, D]."""
        flat = heads * self.head_dim
        if x.shape[-1:] != (flat,) and x.shape[-2:] != (heads, self.head_dim):
            raise ValueError(
                f"PagedAttention: {name} must be [..., {flat}] or [..., {heads}, {self.head_dim}], "
                f"got {list(x.shape)}"
            )
        return x.reshape(-1, heads, self.head_dim)

    def extra_repr(self) -> str:
        options = {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap or None,
            "split_size": self.split_size,
            "sink_tokens": self.sink_tokens or None,
            "interleaved": self.interleaved or None,
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        return ", ".join(
            [f"{self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}", *given]
        )
