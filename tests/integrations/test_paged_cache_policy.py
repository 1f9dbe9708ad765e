"""PagedCache(cache_policy=...) under transformers: its generate, rows, copies and lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import using
from torch import Tensor

import effllm
from effllm.cache import H2O, TOVA, CachePolicy, EvictingKVCache, SnapKV, StreamingLLM

transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

from effllm.integrations.transformers import PagedCache  # noqa: E402  (imports transformers)

POLICIES: dict[str, CachePolicy] = {
    "h2o": H2O(14, 5, 1),
    "streaming": StreamingLLM(2, 10),
    "snap": SnapKV(12, 4, kernel=3),
    "tova": TOVA(11),
}
each_policy = pytest.mark.parametrize("name", POLICIES)
# Rows of different lengths, left-padded with token 0.
PROMPTS = [
    [5, 17, 42, 8, 3, 77, 61],
    [11, 2],
    [(7 * i) % 90 + 1 for i in range(30)],
]
IDS = torch.tensor([[0] * (30 - len(prompt)) + prompt for prompt in PROMPTS])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def ours(model: Any, policy: CachePolicy, **options: Any) -> PagedCache:
    model.set_attn_implementation("effllm")
    return PagedCache(model.config, max_seq_len=80, page_size=4, cache_policy=policy, **options)


def feed(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, **using(model, cache))
    logits: Tensor = out.logits[:, -1]
    return logits


@each_policy
def test_the_text_is_that_of_effllm_generate(llama: Any, name: str) -> None:
    """Whose policies are tested against the dense matrix; padding is no token."""
    policy = POLICIES[name]
    cache = ours(llama, policy)
    out = llama.generate(**INPUTS, do_sample=False, max_new_tokens=30, **using(llama, cache))
    expected = effllm.generate(llama, PROMPTS, max_new_tokens=30, cache_policy=policy)
    assert out[:, 30:].tolist() == [result.tokens for result in expected]
    assert out[:, 30:].tolist() != [
        result.tokens for result in effllm.generate(llama, PROMPTS, max_new_tokens=30)
    ], "nothing that was evicted mattered"
    assert cache.get_seq_length() == 59  # columns seen, and not slots
    assert [cache.pages.length(seq) for seq in cache._seqs] == [36, 31, 59]


@each_policy
def test_a_long_budget_is_the_dynamic_cache_even_with_beams(llama: Any, name: str) -> None:
    policy = {
        "h2o": H2O(60, 5),
        "streaming": StreamingLLM(2, 58),
        "snap": SnapKV(60, 4),
        "tova": TOVA(60),
    }[name]
    options = {**INPUTS, "do_sample": False, "num_beams": 3, "max_new_tokens": 14}
    llama.set_attn_implementation("eager")
    dynamic = transformers.DynamicCache(config=llama.config)
    expected = llama.generate(**options, **using(llama, dynamic))
    assert torch.equal(llama.generate(**options, **using(llama, ours(llama, policy))), expected)


@each_policy
def test_rows_that_are_reordered_keep_their_scores(llama: Any, name: str) -> None:
    """After many evictions; each row then goes on as it does alone."""
    policy = POLICIES[name]
    tokens = torch.randint(1, 97, (3, 60), generator=torch.Generator().manual_seed(2))
    alone = []
    for row in tokens:
        cache = ours(llama, policy)
        alone.append([feed(llama, cache, row[None, :20])])
        alone[-1] += [feed(llama, cache, row[None, i : i + 1]) for i in range(20, 60)]
    cache = ours(llama, policy, max_batch=6)
    feed(llama, cache, tokens[:, :20])
    rows = [0, 1, 2]
    for step in range(20, 60):
        if step == 30:
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            rows = [2, 0, 1]
        if step == 35:
            other = copy.deepcopy(cache)  # which goes its own way
            feed(llama, other, torch.tensor([[1], [2], [3]]))
            del other
        if step == 40:
            cache.batch_select_indices(torch.tensor([0, 2]))
            rows = [rows[0], rows[2]]
        if step == 50:
            cache.batch_repeat_interleave(2)
            rows = [row for row in rows for _ in range(2)]
        logits = feed(llama, cache, tokens[rows, step : step + 1])
        expected = torch.cat([alone[row][step - 19] for row in rows])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@each_policy
def test_crop_goes_back_as_far_as_nothing_is_lost(llama: Any, name: str) -> None:
    policy = POLICIES[name]
    tokens = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    cache = ours(llama, policy)
    feed(llama, cache, tokens[:, :8])
    kept = feed(llama, cache, tokens[:, 8:10])
    if name == "h2o":  # the dropped tokens' attention is in the sums
        with pytest.raises(ValueError, match="length must be 0 or at least 10, got 8"):
            cache.crop(-2)
    else:
        cache.crop(-2)
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(feed(llama, cache, tokens[:, 8:10]), kept)
    assert cache.get_seq_length() == 10
    for step in range(10, 30):
        last = feed(llama, cache, tokens[:, step : step + 1])
    if name == "snap":  # nothing went while it decoded
        cache.crop(-1)
        torch.testing.assert_close(feed(llama, cache, tokens[:, 29:30]), last)
    else:
        with pytest.raises(ValueError, match="cannot be taken back"):
            cache.crop(-1)
    assert cache.get_seq_length() == 30
    feed(llama, cache, tokens[:, 30:31])  # as if nothing had been asked
    cache.crop(-31)
    assert cache.get_seq_length() == 0
    feed(llama, cache, tokens[:, :8])
    torch.testing.assert_close(feed(llama, cache, tokens[:, 8:10]), kept)


def test_memory_is_that_of_the_budget(llama: Any) -> None:
    """Room for a prompt beyond it; a longer one raises."""
    cache = ours(llama, H2O(16, 4), max_prompt=8)
    for _ in range(5):
        feed(llama, cache, torch.arange(1, 9)[None])
    assert isinstance(cache.pages, EvictingKVCache)
    assert cache.pages.pool.num_pages == 1 + 24 // 4
    assert cache.get_seq_length() == 40
    with pytest.raises(ValueError, match="has 16 tokens, cannot add 9: max_seq_len is 24"):
        feed(llama, cache, torch.arange(1, 10)[None])
    assert cache.get_seq_length() == 40


def test_what_it_refuses(llama: Any) -> None:
    with pytest.raises(ValueError, match="cannot rotate keys"):
        ours(llama, StreamingLLM(2, 10, rotate=True))
    cache = ours(llama, StreamingLLM(2, 10))
    feed(llama, cache, torch.arange(1, 31)[None].repeat(2, 1))
    mask = torch.ones(2, 35, dtype=torch.long)
    mask[1, 30:34] = 0  # a row of one new token beside one of five
    with pytest.raises(ValueError, match="must evict to decode one token"):
        feed(llama, cache, torch.arange(1, 11).view(2, 5), mask)
