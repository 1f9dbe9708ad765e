"""Caches in e4m3, int8 and int4 under the page bookkeeping, generation and transformers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import using
from torch import Tensor

import effllm
from effllm import demo, ops
from effllm.cache import PagedKVCache
from effllm.ops._kv_codes import QUANTIZED_KV, as_bits
from effllm.testing import hostile

every_dtype = pytest.mark.parametrize("kv_dtype", QUANTIZED_KV)
PROMPTS = [[5, 17, 42, 8, 3, 77, 61], [11], [90, 33, 21, 54]]


def append(cache: PagedKVCache, items: list[tuple[int, int]], k: Tensor) -> None:
    """k [T, HKV, D] as the keys, and its negative as the values, of the new tokens."""
    batch = cache.step(items)
    for layer in range(cache.num_layers):
        k_cache, v_cache, k_scale, v_scale = cache.layer(layer)
        ops.kv_append(k, -k, k_cache, v_cache, batch.slot_mapping, k_scale, v_scale)


def stored(cache: PagedKVCache, seq_id: int) -> list[Tensor]:
    """Codes and scales of a sequence's tokens, in all layers."""
    pages = torch.tensor(cache.pages(seq_id), dtype=torch.int64)
    return [as_bits(t)[pages].flatten(0, 1)[: cache.length(seq_id)] for t in cache._caches]


@every_dtype
def test_pages_and_scales_are_copied_together(kv_dtype: str, device: str) -> None:
    options: dict[str, Any] = {"max_batch": 4, "max_seq_len": 20, "page_size": 4}
    cache = PagedKVCache(2, 3, 16, kv_dtype=kv_dtype, device=device, **options)
    rows = hostile.normal(8, 3, 16, dtype=torch.bfloat16, device=device)
    first = cache.add()
    append(cache, [(first, 6)], rows[:6])
    second = cache.fork(first)
    append(cache, [(second, 1), (first, 1)], rows[6:])  # one of them copies the shared last page
    assert cache.pages(first)[0] == cache.pages(second)[0]
    assert cache.pages(first)[1] != cache.pages(second)[1]
    plain = PagedKVCache(2, 3, 16, kv_dtype=kv_dtype, device=device, **options)
    for seq_id, last in ((first, 7), (second, 6)):
        alone = plain.add()
        append(plain, [(alone, 7)], torch.cat([rows[:6], rows[last : last + 1]]))
        for found, wanted in zip(stored(cache, seq_id), stored(plain, alone), strict=True):
            assert torch.equal(found, wanted)
    assert len(stored(cache, first)) == 8  # K, V and their scales, of two layers


@every_dtype
def test_reordered_cropped_and_swapped_sequences_keep_their_bits(
    kv_dtype: str, device: str
) -> None:
    """Codes go with their scales, and nothing is quantised twice."""
    options: dict[str, Any] = {"max_batch": 2, "max_seq_len": 20, "page_size": 4}
    cache = PagedKVCache(2, 3, 16, kv_dtype=kv_dtype, device=device, **options)
    rows = hostile.normal(15, 3, 16, dtype=torch.bfloat16, device=device)
    seqs = [cache.add(), cache.add()]
    append(cache, [(seqs[0], 6), (seqs[1], 5)], rows[:11])
    cache.reorder(seqs, [1, 0])
    cache.crop(seqs[0], 3)
    for seq_id in seqs:
        cache.swap_out(seq_id)
    for seq_id in reversed(seqs):
        cache.swap_in(seq_id)
    append(cache, [(seqs[0], 2), (seqs[1], 2)], rows[11:])
    plain = PagedKVCache(2, 3, 16, kv_dtype=kv_dtype, device=device, **options)
    for seq_id, fed in zip(seqs, ([6, 7, 8, 11, 12], [*range(6), 13, 14]), strict=True):
        alone = plain.add()
        append(plain, [(alone, len(fed))], rows[fed])
        for found, wanted in zip(stored(cache, seq_id), stored(plain, alone), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("kv_dtype", "bytes_per_row"), [("e4m3", 64 + 4), ("int8", 64 + 4), ("int4", 32 + 4)]
)
def test_bytes_of_a_row(kv_dtype: str, bytes_per_row: int) -> None:
    cache = PagedKVCache(3, 2, 64, max_batch=1, max_seq_len=32, kv_dtype=kv_dtype)
    rows = 2 * 3 * 2 * cache.pool.num_pages * cache.page_size
    assert sum(tensor.nbytes for tensor in cache._caches) == rows * bytes_per_row


@every_dtype
def test_generate_does_not_depend_on_pages_or_neighbours(llama: Any, kv_dtype: str) -> None:
    """Rows are quantised one by one: sharing, copying and batching change no bit of them."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    together = effllm.generate(llama, PROMPTS, max_new_tokens=10, kv_dtype=kv_dtype)
    config = llama.config
    for page_size in (1, 4):
        cache = PagedKVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            max_batch=2,
            max_seq_len=64,
            page_size=page_size,
            dtype=torch.float32,
            kv_dtype=kv_dtype,
        )
        for prompt, result in zip(PROMPTS, together, strict=True):
            for _ in range(2):  # the second time over pages that the first one left
                (alone,) = effllm.generate(llama, [prompt], max_new_tokens=10, cache=cache)
                assert alone.tokens == result.tokens


@every_dtype
@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_generate(llama: Any, kv_dtype: str, beams: int) -> None:
    """Pages of one token are never copied, those of four are: beams must not notice."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    from effllm.integrations.transformers import PagedCache

    ids = torch.tensor([PROMPTS[0]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    llama.set_attn_implementation("effllm")
    results = []
    for page_size in (1, 4):
        cache = PagedCache(llama.config, max_seq_len=32, page_size=page_size, kv_dtype=kv_dtype)
        results.append(
            llama.generate(ids, **using(llama, cache), num_beams=beams, **arguments).tolist()
        )
        assert cache.pages is not None
        assert cache.pages.k[0].dtype == QUANTIZED_KV[kv_dtype]
    assert results[0] == results[1]
    if beams == 1:
        llama.set_attn_implementation("sdpa")
        (ours,) = effllm.generate(llama, [PROMPTS[0]], max_new_tokens=10, kv_dtype=kv_dtype)
        assert results[0][0][len(PROMPTS[0]) :] == ours.tokens


@every_dtype
def test_copies_of_a_cache_keep_its_dtype(llama: Any, kv_dtype: str) -> None:
    """Made before the first token, a copy allocates pages of its own; made after it, it shares."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    from effllm.integrations.transformers import PagedCache

    ids, follow = torch.tensor([PROMPTS[0]]), torch.tensor([PROMPTS[2]])
    llama.set_attn_implementation("effllm")
    unused = PagedCache(llama.config, max_seq_len=16, max_batch=3, kv_dtype=kv_dtype)
    filled, exact = copy.deepcopy(unused), PagedCache(llama.config, max_seq_len=16)
    with torch.no_grad():
        for cache in (unused, filled, exact):
            llama(ids, **using(llama, cache))
        shared = copy.deepcopy(filled)
        expected, *others, plain = (
            llama(follow, **using(llama, cache)).logits for cache in (unused, filled, shared, exact)
        )
    assert all(torch.equal(other, expected) for other in others)
    assert not torch.equal(plain, expected)
    for cache in (unused, filled, shared):
        assert cache.pages is not None
        assert cache.pages.k[0].dtype == QUANTIZED_KV[kv_dtype]


def test_perplexity_of_the_demo_model() -> None:
    """8 bits cost next to nothing, 4 bits little: bounds are at least twice what more text shows
    (bench/results/kv_quality.md). A lost or misplaced scale costs far more."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    from effllm.integrations.transformers import PagedCache

    model, tokenizer = demo.load(dtype=torch.float32)
    windows = demo.held_out_tokens(tokenizer, context=256, limit=2048)
    model.set_attn_implementation("effllm")

    def perplexity(kv_dtype: str | None) -> float:
        cache = partial(PagedCache, model.config, max_seq_len=256, kv_dtype=kv_dtype)
        return demo.perplexity(model, windows, make_cache=cache)

    exact = perplexity(None)
    assert exact == pytest.approx(demo.perplexity(model, windows), rel=1e-4)
    for kv_dtype, bound in {"int8": 0.002, "e4m3": 0.01, "int4": 0.06}.items():
        assert perplexity(kv_dtype) < exact * (1 + bound), kv_dtype


def test_bad_options(llama: Any) -> None:
    sizes: dict[str, Any] = {"max_batch": 1, "max_seq_len": 8}
    with pytest.raises(ValueError, match="kv_dtype must be e4m3, int8, int4 or None, got 'fp4'"):
        PagedKVCache(1, 1, 8, kv_dtype="fp4", **sizes)
    with pytest.raises(ValueError, match="int4 needs an even head_dim, got 7"):
        PagedKVCache(1, 1, 7, kv_dtype="int4", **sizes)
    cache = PagedKVCache(1, 1, 8, **sizes)
    with pytest.raises(ValueError, match=r"kv_dtype must be None with a cache, .* got 'int8'"):
        effllm.generate(llama, PROMPTS, cache=cache, kv_dtype="int8")
