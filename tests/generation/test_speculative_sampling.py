"""Sampled text with drafts has the law of the model's own, however trees come about."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from scripted_draft import Scripted, chain_of
from torch import Tensor

import effllm
from effllm.generation.sampling import Sampling
from effllm.speculative import MedusaDraft, MedusaHeads, ModelDraft, NGramDraft

PROMPT = [5, 17, 42, 8, 3, 77, 61]
TEMPERATURE, TOP_K, TOP_P = 1.0, 4, 0.95
NEW = 4


def law_of_next(logits: Tensor) -> dict[int, float]:
    """By definition: temperature, then the k likeliest, then the fewest that reach top_p."""
    best = (logits.double() / TEMPERATURE).softmax(-1).topk(TOP_K)
    probs = best.values / best.values.sum()
    kept: dict[int, float] = {}
    for token, p in zip(best.indices.tolist(), probs.tolist(), strict=True):
        if sum(kept.values()) < TOP_P:
            kept[token] = p
    return {token: p / sum(kept.values()) for token, p in kept.items()}


@torch.no_grad()
def law_of_texts(model: Any) -> dict[tuple[int, ...], float]:
    """The probability of every text of NEW tokens that is possible."""
    laws = {(): 1.0}
    for _ in range(NEW):
        ids = torch.tensor([[*PROMPT, *text] for text in laws])
        logits = model(ids).logits[:, -1]
        laws = {
            (*text, token): p * q
            for (text, p), row in zip(laws.items(), logits, strict=True)
            for token, q in law_of_next(row).items()
        }
    return laws


def drafts(llama: Any) -> dict[str, Any]:
    """Those whose words carry weight: near the target, so that they are accepted and rejected."""
    torch.manual_seed(1)
    near = type(llama)(llama.config).eval()
    far = dict(near.named_parameters())
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            far[name].copy_(parameter + 0.25 * far[name])
    likeliest = effllm.generate(llama, [PROMPT], max_new_tokens=NEW)[0].tokens[1:]
    heads = MedusaHeads(64, 97, num_heads=3, lm_head=llama.lm_head.weight)
    return {
        "drawn": ModelDraft(near, depth=3),
        "drawn, trees": ModelDraft(near, depth=3, candidates=2),
        "its own text": Scripted(lambda r: chain_of(r, likeliest)),
        "heads": MedusaDraft(heads, candidates=1),
        "heads, trees": MedusaDraft(heads),
        "n-gram": NGramDraft(),
    }


def excess(counts: Counter[tuple[int, ...]], laws: dict[tuple[int, ...], float]) -> float:
    """Chi-square over texts, rare ones together, in standard deviations above its mean."""
    total = counts.total()
    cells, rare = [], [0.0, 0.0]
    for text, p in laws.items():
        if total * p < 5:
            rare = [rare[0] + counts[text], rare[1] + total * p]
        else:
            cells.append((counts[text], total * p))
    if rare[1] > 0:
        cells.append((rare[0], rare[1]))
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "name", ["drawn", "drawn, trees", "its own text", "heads", "heads, trees", "n-gram"]
)
def test_texts_have_the_law_of_the_model(llama: Any, name: str) -> None:
    """20,000 texts of fixed seeds; those of probability zero never come out."""
    laws = law_of_texts(llama)
    assert len(laws) > 50
    draft = drafts(llama)[name]
    counts: Counter[tuple[int, ...]] = Counter()
    steps = 0
    for part in range(10):
        results = effllm.generate(
            llama,
            [PROMPT] * 2000,
            max_new_tokens=NEW,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            top_p=TOP_P,
            seed=2000 * part,
            draft=draft,
            tree=5,
        )
        counts.update(tuple(result.tokens) for result in results)
        steps += sum(result.steps for result in results)
    assert not counts.keys() - laws.keys()
    assert excess(counts, laws) < 5
    if name != "n-gram":  # drafts were accepted, and rejected
        assert 2 * 20_000 < steps < NEW * 20_000


def test_the_law_of_another_temperature_is_seen(llama: Any) -> None:
    """That the test above can fail: texts of a colder law."""
    laws = law_of_texts(llama)
    results = effllm.generate(
        llama,
        [PROMPT] * 4000,
        max_new_tokens=NEW,
        temperature=0.8 * TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        draft=ModelDraft(llama, depth=3),
        tree=5,
    )
    assert excess(Counter(tuple(r.tokens) for r in results), laws) > 5


@pytest.mark.parametrize("name", ["drawn", "drawn, trees", "heads", "heads, trees", "n-gram"])
def test_texts_do_not_depend_on_the_batch(llama: Any, name: str) -> None:
    prompts = [PROMPT, [11], [90, 33, 21, 54], list(range(1, 41)), [7, 8] * 4]
    options: dict[str, Any] = {
        "max_new_tokens": 20, "temperature": 0.8, "top_p": 0.95, "draft": drafts(llama)[name],
        "tree": 5,
    }  # fmt: skip
    batch = effllm.generate(llama, prompts, seed=7, **options)
    assert batch == effllm.generate(llama, prompts, seed=7, **options)
    assert batch != effllm.generate(llama, prompts, seed=8, **options)
    for i, prompt in enumerate(prompts):
        assert effllm.generate(llama, [prompt], seed=7 + i, **options) == [batch[i]]
    same = effllm.generate(llama, [PROMPT] * 3, seed=7, **options)
    assert len({tuple(result.tokens) for result in same}) == 3


def test_seeds_of_any_size(llama: Any) -> None:
    for seed in (-1, 2**63 - 1, 2**64 + 5, -(2**70)):
        results = effllm.generate(
            llama, [PROMPT] * 2, max_new_tokens=4, temperature=1.0, seed=seed, draft=NGramDraft()
        )
        assert all(len(result.tokens) == 4 for result in results)


def test_law_is_what_choose_draws_from() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, ::2] = -math.inf
    for top_k, top_p in product((None, 7), (None, 0.6)):
        sampling = Sampling(1.2, top_k, top_p)
        law = sampling.law(logits).double()
        law /= law.sum(-1, keepdim=True)
        draws = [(i + 0.5) / 4000 for i in range(4000)]
        for row in range(3):
            chosen = sampling.choose(logits[row].expand(4000, -1), draws)
            found = chosen.bincount(minlength=50) / 4000
            torch.testing.assert_close(found.double(), law[row], atol=3e-4, rtol=0)
