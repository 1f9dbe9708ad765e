"""generate: from prompts to text, one model call per step for the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from effllm.cache import CachePolicy, EvictingKVCache, Full, OutOfPages, PagedKVCache
from effllm.cache.batch import upload
from effllm.generation.paged_model import (
    PagedModel,
    context_of,
    effllm_attention,
    fitting_cache,
)
from effllm.generation.request import Prompts, Request, make_requests
from effllm.generation.sampling import Sampling
from effllm.generation.speculate import Speculation
from effllm.generation.step_graph import use_graphs

if TYPE_CHECKING:
    from effllm.speculative import Draft

_MAX_NODES = 64  # of a tree, as many as a mask word has bits


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    Attributes:
        tokens: the new tokens; a stop token, if one ended it, is the last.
        text: the tokens decoded without special tokens, None without a tokenizer.
        finish_reason: "stop" after a stop token, "length" after max_new_tokens.
        steps: calls of the model that it took, the prompt's included; with a draft fewer than
            tokens.
    """

    tokens: list[int]
    text: str | None
    finish_reason: Literal["stop", "length"]
    steps: int


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
    cache_policy: CachePolicy | None = None,
    draft: Draft | None = None,
    tree: int = 8,
    cuda_graphs: bool | None = None,
) -> list[Generation]:
    """Continues every prompt with a transformers causal language model, over the paged cache.

    The first step feeds all prompts at once, packed without padding; each later step feeds one
    token per unfinished prompt or, with a ``draft``, a tree of tokens that may come next, of which
    the model keeps what it would have said. Attention is switched to "effllm" for the call.

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
        cache_policy: of ``effllm.cache``: which keys and values to keep of a text, ``H2O``,
            ``StreamingLLM``, ``SnapKV`` or ``TOVA``; None and ``Full()`` keep all. A given cache
            has its own. It goes without a draft and without ``cuda_graphs``.
        draft: of ``effllm.speculative``: ``NGramDraft``, ``ModelDraft``, ``MedusaDraft``. Greedy
            text is what it is without: the model computes the same, although sums over a tree may
            be added in another order than for one token, which can tip two tokens that are equally
            likely to within rounding. Sampled text has the same law, but draws other numbers than
            without a draft; they do not depend on the batch either.
        tree: nodes of a tree, 2 to 64, the last certain token included. A given cache lends them
            the pages that the prompts leave over: trees get smaller where it has none.
        cuda_graphs: whether steps after the prompts' are padded to few shapes and replayed as CUDA
            graphs, each of which is recorded when its shape comes again, instead of launching
            kernel by kernel. None: on a GPU where they can be: a model that is all there, of a
            class that says so (``_can_compile_fullgraph``), without a rotary embedding that looks
            at lengths, and a cache that evicts nothing. True insists. They hold memory for the time
            of the call: the logits of each shape, and what the largest needs.

    Raises:
        ValueError: bad options, an empty prompt, or one that exceeds the model's context; or
            ``cuda_graphs=True`` for a model or a cache whose steps cannot be graphs.
        OutOfPages: a given cache is too small; no token was generated.
    """
    if max_new_tokens < 1:
        raise ValueError(f"effllm.generate: max_new_tokens must be >= 1, got {max_new_tokens}")
    if not 2 <= tree <= _MAX_NODES:
        raise ValueError(f"effllm.generate: tree must be in [2, {_MAX_NODES}], got {tree}")
    sampling = Sampling(temperature, top_k, top_p)
    requests = make_requests(
        prompts,
        tokenizer,
        attention_mask,
        seed=seed,
        max_new_tokens=max_new_tokens,
        context=None if _has_no_end(cache_policy, cache) else context_of(model),
    )
    stops = _stop_tokens(model) if stop_tokens is None else frozenset(stop_tokens)
    spare = 0 if draft is None else tree - 1  # nodes beyond the text, while they are verified
    if cache is None:
        policy = cache_policy or Full()
        lengths = [policy.needed(len(r.prompt), max_new_tokens + spare) for r in requests]
        cache = fitting_cache(model, lengths, kv_dtype, policy)
    else:
        for name, value in (("kv_dtype", kv_dtype), ("cache_policy", cache_policy)):
            if value is not None:
                raise ValueError(
                    f"effllm.generate: {name} must be None with a cache, which has its own, got "
                    f"{value!r}"
                )
    if draft is not None and isinstance(cache, EvictingKVCache):
        raise ValueError(
            "effllm.generate: draft must be None with a cache_policy: attention to rejected tokens "
            f"would count, got {type(draft).__name__}"
        )
    if cuda_graphs and isinstance(cache, EvictingKVCache):
        raise ValueError(
            "effllm.generate: cuda_graphs must be False or None with a cache_policy: the host says "
            "of each step what it evicts, got True"
        )
    graphs = not isinstance(cache, EvictingKVCache) and use_graphs(model, cuda_graphs)

    def accept(request: Request, token: int) -> None:
        request.accept(token, stops, max_new_tokens)
        if stream is not None:
            stream(request.index, token, request.new_text(tokenizer))

    widest = 1 if draft is None else tree  # tokens of a step after the prompts'
    paged = PagedModel(
        model, cache, graph_tokens=widest if graphs else 0, with_hidden=draft is not None
    )
    try:
        for request in requests:
            request.seq = cache.add(request.prompt)
            request.pending = request.prompt[cache.length(request.seq) :]
            # The last new token is never fed.
            cache.reserve(request.seq, len(request.pending), max_new_tokens - 1)
        for request in requests if spare else ():
            most = cache.max_seq_len - cache.length(request.seq)
            with suppress(OutOfPages):
                cache.reserve(
                    request.seq, min(len(request.pending) + max_new_tokens - 1 + spare, most)
                )
        with effllm_attention(model):
            if draft is None:
                _decode(paged, sampling, requests, accept)
            else:
                Speculation(paged, draft, sampling, tree, max_new_tokens).run(requests, accept)
        for request in requests:
            cache.commit(request.seq, request.prompt + request.tokens)
    finally:
        for request in requests:
            if request.seq >= 0:
                cache.free(request.seq)
    return [
        Generation(r.tokens, r.text(tokenizer), r.finish_reason or "length", r.steps)
        for r in requests
    ]


def _decode(
    paged: PagedModel,
    sampling: Sampling,
    requests: list[Request],
    accept: Callable[[Request, int], None],
) -> None:
    """Without a draft: one token per step and unfinished request."""
    active = requests
    while active:
        # On their way before the model runs: nothing waits between it and the choice.
        draws = np.array([r.rng.random() for r in active])
        (sent,) = upload([draws], paged.cache.page_table.device)
        logits = paged.step([(r.seq, r.pending) for r in active]).logits
        chosen = sampling.choose(logits, sent).tolist()
        for request, token in zip(active, chosen, strict=True):
            request.steps += 1
            accept(request, token)
        active = [r for r in active if r.finish_reason is None]


def _has_no_end(policy: CachePolicy | None, cache: PagedKVCache | None) -> bool:
    """Whether distances between tokens stay limited, so that no text is too long for the model."""
    if isinstance(cache, EvictingKVCache):
        policy = cache.policy
    return policy is not None and policy.rotates


def _stop_tokens(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
