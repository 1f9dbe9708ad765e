"""A model whose attention reads and writes a paged cache: what every step of generation runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effllm._host import TokenTree
from effllm.cache import CachePolicy, EvictingKVCache, PagedBatch, PagedContext, PagedKVCache
from effllm.cache.batch import upload
from effllm.generation.step_graph import StepGraphs

_PAGE_SIZE = 16
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # frequencies that the length leaves alone


@dataclass(frozen=True)
class Step:
    """What a step of a model gave; valid until the next one.

    Attributes:
        batch: where its tokens are.
        logits: [R, V] after the tokens that were asked for.
        hidden: [R, hidden_size] that the model's head made them of, None if it was not asked for.
    """

    batch: PagedBatch
    logits: Tensor
    hidden: Tensor | None


class PagedModel:
    """A transformers causal language model and the cache of its sequences."""

    def __init__(
        self, model: Any, cache: PagedKVCache, *, graph_tokens: int = 0, with_hidden: bool = False
    ) -> None:
        """``graph_tokens``: steps of at most so many tokens of each sequence are CUDA graphs, 0:
        none is. ``with_hidden``: steps give hidden states; ValueError for a model without a head.
        """
        self.model = model
        self.cache = cache
        self._with_hidden = with_hidden
        if with_hidden and model.get_output_embeddings() is None:
            raise ValueError(f"effllm.generate: {type(model).__name__} has no output head")
        self._graphs = StepGraphs(cache, graph_tokens) if graph_tokens else None

    def step(
        self,
        fed: Sequence[tuple[int, Sequence[int]]],
        trees: Sequence[TokenTree] | None = None,
    ) -> Step:
        """Feeds each (sequence, tokens).

        Logits are those after the last token of each or, with ``trees``, after every node: the last
        tokens of each sequence are the nodes of its tree, all of them if any tree has branches.
        """
        counts = [len(tokens) for _, tokens in fed]
        kept = [1] * len(fed) if trees is None else [len(tree) for tree in trees]
        branching = trees if trees and not all(map(_is_chain, trees)) else None
        ends = accumulate(counts)
        rows = [row for end, n in zip(ends, kept, strict=True) for row in range(end - n, end)]
        if self._graphs is not None and self._graphs.takes(counts):
            batch, logits, hidden = self._graphs.step(self._forward, fed, branching)
            if len(rows) < batch.num_tokens:
                (index,) = upload([np.array(rows, dtype=np.int64)], logits.device)
                logits, hidden = logits[index], None if hidden is None else hidden[index]
            return Step(batch, logits, hidden)
        batch = self.cache.step([(seq, len(tokens)) for seq, tokens in fed])
        if branching is not None:
            batch = batch.with_trees(branching)
        ids = [token for _, tokens in fed for token in tokens]
        arrays = [np.array(values, dtype=np.int64) for values in (ids, rows)]
        return Step(batch, *self._forward(batch, *upload(arrays, batch.positions.device)))

    def _forward(
        self, batch: PagedBatch, ids: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and hidden states, after the tokens at the indices ``rows``, None: all."""
        seen: list[Tensor] = []
        hook = None
        if self._with_hidden:
            head = self.model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            logits = self.model(
                input_ids=ids[None],
                position_ids=batch.positions[None],
                effllm=PagedContext(self.cache, batch),
                use_cache=False,
                logits_to_keep=0 if rows is None else rows,
            ).logits
        finally:
            if hook is not None:
                hook.remove()
        return logits[0], seen[0].flatten(0, -2) if seen else None


def _is_chain(tree: TokenTree) -> bool:
    """A chain is text as any other."""
    return tree.parents == list(range(-1, len(tree) - 1))


def context_of(model: Any) -> int | None:
    """The most tokens that the model can read, None if it does not say."""
    config = model.config.get_text_config(decoder=True)
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def fitting_cache(
    model: Any,
    lengths: Sequence[int],
    kv_dtype: str | None = None,
    policy: CachePolicy | None = None,
) -> PagedKVCache:
    """Room for sequences of these lengths, in the model's dtype and on its device; those that a
    policy leaves of texts, if it evicts."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    shape = (
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    options: dict[str, Any] = {
        "max_batch": max(1, len(lengths)),
        "max_seq_len": max(lengths, default=1),
        "page_size": _PAGE_SIZE,
        # One more for the pool's own page 0, one so that an empty batch has a pool at all.
        "num_pages": 2 + sum(-(-length // _PAGE_SIZE) for length in lengths),
        "dtype": model.dtype,
        "kv_dtype": kv_dtype,
        "device": model.device,
    }
    if policy is None or policy.slots is None:
        return PagedKVCache(*shape, **options)
    inv_freq = rotary_frequencies(model) if policy.rotates else None
    return EvictingKVCache(policy, *shape, inv_freq=inv_freq, **options)


def rotary_frequencies(model: Any) -> Tensor:
    """inv_freq [R / 2] of a model whose rotary embedding turns every position alike, in halves.

    ValueError for any other model: its keys cannot be rotated on.
    """
    decoder = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    rotate_half = getattr(sys.modules[type(decoder).__module__], "rotate_half", None)
    kind = getattr(rotary, "rope_type", None)
    inv_freq: Tensor | None = getattr(rotary, "inv_freq", None)
    halves = rotate_half is not None and rotate_half(torch.arange(4.0)).tolist() == [-2, -3, 0, 1]
    if not halves or kind not in _STATIC_ROPE or inv_freq is None:
        raise ValueError(
            f"effllm.generate: {type(model).__name__} has no rotary embedding whose keys can be "
            f"rotated on: needed are halves of one of the types {sorted(_STATIC_ROPE)}, got "
            f"{'halves' if halves else 'other pairs'} of type {kind!r}"
        )
    return inv_freq


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
