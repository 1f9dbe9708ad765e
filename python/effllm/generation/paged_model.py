"""A model whose attention reads and writes a paged cache: what every step of generation runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.cache import PagedBatch, PagedContext, PagedKVCache

_PAGE_SIZE = 16


@dataclass(frozen=True)
class PagedModel:
    """A transformers causal language model and the cache of its sequences."""

    model: Any
    cache: PagedKVCache

    def logits(self, batch: PagedBatch, tokens: Sequence[int], rows: Tensor) -> Tensor:
        """Logits [R, V] after the tokens of a step at the indices ``rows``, int64 [R]."""
        out: Tensor = self.model(
            input_ids=torch.tensor([tokens], device=batch.positions.device),
            position_ids=batch.positions[None],
            effllm=PagedContext(self.cache, batch),
            use_cache=False,
            logits_to_keep=rows,
        ).logits
        return out[0]

    def logits_and_hidden(
        self, batch: PagedBatch, tokens: Sequence[int], rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same, and the hidden states [R, hidden_size] that the model's head made them of."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(f"effllm.generate: {type(self.model).__name__} has no output head")
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            logits = self.logits(batch, tokens, rows)
        finally:
            hook.remove()
        return logits, seen[0].flatten(0, -2)


def context_of(model: Any) -> int | None:
    """The most tokens that the model can read, None if it does not say."""
    config = model.config.get_text_config(decoder=True)
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def fitting_cache(model: Any, lengths: Sequence[int], kv_dtype: str | None = None) -> PagedKVCache:
    """Room for sequences of these lengths, in the model's dtype and on its device."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return PagedKVCache(
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_batch=max(1, len(lengths)),
        max_seq_len=max(lengths, default=1),
        page_size=_PAGE_SIZE,
        # One more for the pool's own page 0, one so that an empty batch has a pool at all.
        num_pages=2 + sum(-(-length // _PAGE_SIZE) for length in lengths),
        dtype=model.dtype,
        kv_dtype=kv_dtype,
        device=model.device,
    )


@contextmanager
def effllm_attention(model: Any) -> Iterator[None]:
    """Runs the model with our attention, then with its own again."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("effllm")
    # transformers only warns when a model computes its attention by itself.
    if model.config._attn_implementation != "effllm":
        raise ValueError(
            f"effllm.generate: {type(model).__name__} does not take its attention from "
            "transformers' AttentionInterface"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
