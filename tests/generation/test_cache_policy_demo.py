"""Policies on a trained model: what evicting costs the demo model, and what sinks are for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effllm import demo
from effllm.cache import H2O, CachePolicy, Full, SnapKV, StreamingLLM
from effllm.generation.paged_model import PagedModel, effllm_attention, fitting_cache


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    return demo.load(dtype=torch.float32)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, policy: CachePolicy, scored: int) -> float:
    """Of the last tokens of windows [W, T], decoded one by one behind a prompt of the others."""
    rows, length = windows.shape
    prompt = length - scored
    cache = fitting_cache(model, [policy.needed(prompt, scored)] * rows, policy=policy)
    paged, seqs = PagedModel(model, cache), [cache.add() for _ in range(rows)]
    total, begin = 0.0, 0
    with effllm_attention(model):
        for end in range(prompt, length):
            fed = windows[:, begin:end].tolist()
            logits = paged.step(list(zip(seqs, fed, strict=True))).logits
            total += F.cross_entropy(logits, windows[:, end], reduction="sum").item()
            begin = end
    return math.exp(total / (rows * scored))


def test_attention_says_better_than_age_what_to_keep(trained: tuple[Any, Any]) -> None:
    """At 20 % of 512 tokens; the full cache is best. (Raw sums of so short texts are not: they
    keep the first tokens.)"""
    model, tokenizer = trained
    windows = demo.held_out_tokens(tokenizer, context=512, limit=8 * 512)
    full, window, *others = (
        perplexity(model, windows, policy, 64)
        for policy in (
            Full(),
            StreamingLLM(0, 102),
            H2O(102, 51, normalize=True),
            SnapKV(102, 32),
        )
    )
    assert full < min(others)
    assert max(others) < window


@torch.no_grad()
def test_a_window_reads_beyond_the_trained_length(trained: tuple[Any, Any]) -> None:
    """3,584 tokens for a model that knows 2,048: without limits its perplexity explodes."""
    model, tokenizer = trained
    ids = demo.held_out_tokens(tokenizer, context=3584)[0]
    perplexities = []
    for policy in (Full(), StreamingLLM(0, 512)):
        cache = fitting_cache(model, [3584], policy=policy)
        batch = cache.step([(cache.add(), 3584)])
        rows = torch.arange(3583 - 512, 3583)
        with effllm_attention(model):
            logits, _ = PagedModel(model, cache)._forward(batch, ids, rows)
        perplexities.append(F.cross_entropy(logits, ids[rows + 1]).exp().item())
    full, window = perplexities
    assert full > 5 * window
