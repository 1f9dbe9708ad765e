"""generate: from prompts to text, one model call per step for the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effllm.cache import PagedBatch, PagedContext, PagedKVCache
from effllm.generation.request import Prompts, Request, make_requests
from effllm.generation.sampling import Sampling

_PAGE_SIZE = 16


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    Attributes:
        tokens: the new tokens; a stop token, if one ended it, is the last.
        text: the tokens decoded without special tokens, None without a tokenizer.
        finish_reason: "stop" after a stop token, "length" after max_new_tokens.
    """

    tokens: list[int]
    text: str | None
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Iterable[int] | None = None,
    stream: Callable[[int, int, str], None] | None = None,
    cache: PagedKVCache | None = None,
    kv_dtype: str | None = None,
) -> list[Generation]:
    """Continues every prompt with a transformers causal language model, over the paged cache.

    The first step feeds all prompts at once, packed without padding; each later step feeds one
    token per unfinished prompt. Attention is switched to "effllm" for the call.

    Args:
        model: on any device, in fp16 or bf16 (fp32 too on the CPU), quantised or not.
        prompts: strings (needs ``tokenizer``), lists of token ids, or int ``[B, S]`` with an
            ``attention_mask [B, S]`` whose zeros are padding.
        tokenizer: a transformers tokenizer, also used to decode the result.
        max_new_tokens: per prompt.
        temperature: None or 0 takes the likeliest token; otherwise it divides the logits.
        top_k, top_p: cut the distribution, in this order.
        seed: prompt i draws from a generator of its own, seeded with seed + i. So the same prompt
            alone with that seed draws the same numbers, whatever else was in the batch.
        stop_tokens: ids that end a prompt; by default those of ``model.generation_config``.
        stream: called as ``stream(prompt_index, token, new_text)`` for every token. A character
            that is not complete yet comes with a later token; "" without a tokenizer.
        cache: reused across calls, so that prompts with a common beginning share its pages; by
            default one is made that fits. Reset it when the weights change.
        kv_dtype: "e4m3", "int8" or "int4" to keep keys and values in 8 or 4 bits; a given cache
            has its own.

    Raises:
        ValueError: bad options, an empty prompt, or one that exceeds the model's context.
        OutOfPages: a given cache is too small; no token was generated.
    """
    if max_new_tokens < 1:
        raise ValueError(f"effllm.generate: max_new_tokens must be >= 1, got {max_new_tokens}")
    sampling = Sampling(temperature, top_k, top_p)
    config = model.config.get_text_config(decoder=True)
    requests = make_requests(
        prompts,
        tokenizer,
        attention_mask,
        seed=seed,
        max_new_tokens=max_new_tokens,
        context=getattr(config, "max_position_embeddings", None),
    )
    stops = _stop_tokens(model) if stop_tokens is None else frozenset(stop_tokens)
    if cache is None:
        cache = _fitting_cache(model, config, requests, max_new_tokens, kv_dtype)
    elif kv_dtype is not None:
        raise ValueError(
            "effllm.generate: kv_dtype must be None with a cache, which has its own, got "
            f"{kv_dtype!r}"
        )

    try:
        for request in requests:
            request.seq = cache.add(request.prompt)
            request.pending = request.prompt[cache.length(request.seq) :]
            # The last new token is never fed.
            cache.reserve(request.seq, len(request.pending) + max_new_tokens - 1)
        active = requests
        with _effllm_attention(model):
            while active:
                batch = cache.step([(r.seq, len(r.pending)) for r in active])
                logits = _forward(model, cache, batch, [t for r in active for t in r.pending])
                tokens = sampling.choose(logits, [r.rng.random() for r in active]).tolist()
                for request, token in zip(active, tokens, strict=True):
                    request.accept(token, stops, max_new_tokens)
                    if stream is not None:
                        stream(request.index, token, request.new_text(tokenizer))
                active = [r for r in active if r.finish_reason is None]
        for request in requests:
            cache.commit(request.seq, request.prompt + request.tokens)
    finally:
        for request in requests:
            if request.seq >= 0:
                cache.free(request.seq)
    return [Generation(r.tokens, r.text(tokenizer), r.finish_reason or "length") for r in requests]


def _forward(model: Any, cache: PagedKVCache, batch: PagedBatch, tokens: list[int]) -> Tensor:
    """Logits [B, V] after the last token of every row of the step."""
    logits: Tensor = model(
        input_ids=torch.tensor([tokens], device=batch.positions.device),
        position_ids=batch.positions[None],
        effllm=PagedContext(cache, batch),
        use_cache=False,
        logits_to_keep=batch.cu_seqlens_q[1:].long() - 1,
    ).logits
    return logits[0]


def _stop_tokens(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _fitting_cache(
    model: Any, config: Any, requests: list[Request], max_new_tokens: int, kv_dtype: str | None
) -> PagedKVCache:
    """Room for exactly these requests, in the model's dtype and on its device."""
    heads = config.num_attention_heads
    lengths = [len(request.prompt) + max_new_tokens for request in requests]
    return PagedKVCache(
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_batch=max(1, len(requests)),
        max_seq_len=max(lengths, default=1),
        page_size=_PAGE_SIZE,
        # One more for the pool's own page 0, one so that an empty batch has a pool at all.
        num_pages=2 + sum(-(-length // _PAGE_SIZE) for length in lengths),
        dtype=model.dtype,
        kv_dtype=kv_dtype,
        device=model.device,
    )


@contextmanager
def _effllm_attention(model: Any) -> Iterator[None]:
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
