"""Drafts on trained models: what the demo model says of held-out text, and how fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effllm
from effllm import demo
from effllm.speculative import MedusaDraft, MedusaHeads, ModelDraft, NGramDraft

COUNT, LENGTH, NEW = 200, 24, 12
NEW_ON_GPU = 24


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Target and draft, in fp32."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    return tuple(
        demo.load(path, dtype=torch.float32)[0] for path in (demo.model_path(), demo.draft_path())
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    _, tokenizer = demo.load(demo.draft_path())
    tokens = demo.held_out_tokens(tokenizer).flatten()
    return tokens.unfold(0, LENGTH, len(tokens) // COUNT)[:COUNT].tolist()


def decode(
    model: Any, prompts: list[list[int]], batch: int, new: int = NEW, **options: Any
) -> list[effllm.Generation]:
    results = []
    for first in range(0, len(prompts), batch):
        results += effllm.generate(
            model, prompts[first : first + batch], max_new_tokens=new, stop_tokens=(), **options
        )
    return results


@pytest.fixture(scope="module")
def plain(models: tuple[Any, Any], prompts: list[list[int]]) -> list[list[int]]:
    return [result.tokens for result in decode(models[0], prompts, 40)]


def draft_of(kind: str, small: Any) -> tuple[Any, int, float]:
    """The draft, nodes of its trees, and the tokens per step that it gives at least."""
    if kind == "chain":
        return ModelDraft(small, depth=3), 4, 1.6
    heads = MedusaHeads.from_pretrained(demo.medusa_path(), dtype=torch.float32)
    return MedusaDraft(heads), 8, 1.2


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_greedy_text_of_200_prompts_stays_as_it_is(
    models: tuple[Any, Any],
    prompts: list[list[int]],
    plain: list[list[int]],
    kind: str,
    batch: int,
) -> None:
    """In fp32, whose sums over other numbers of rows differ by 1e-5 of logits at most here: none of
    these 2400 tokens is that close to another."""
    target, small = models
    draft, nodes, least = draft_of(kind, small)
    results = decode(target, prompts, batch, draft=draft, tree=nodes)
    assert [result.tokens for result in results] == plain
    assert COUNT * NEW / sum(result.steps for result in results) > least


def test_text_repeats_itself(models: tuple[Any, Any]) -> None:
    """What n-grams are for: here all that is wanted stands in the prompt."""
    _, tokenizer = demo.load(demo.draft_path())
    prompt = tokenizer("    self.first = first\n    self.second = second\n" * 6)["input_ids"][:-3]
    (plain,) = effllm.generate(models[0], [prompt], max_new_tokens=24)
    (result,) = effllm.generate(models[0], [prompt], max_new_tokens=24, draft=NGramDraft(), tree=9)
    assert result.tokens == plain.tokens
    assert result.steps <= 8


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["n-gram", "chain", "tree"])
def test_gpu_tokens_are_the_likeliest(
    models: tuple[Any, Any], prompts: list[list[int]], kind: str
) -> None:
    """Teacher forcing in fp32 on the CPU: each token that a GPU accepts in bf16 is within rounding
    of the best; exact equality would hang on ties."""
    target, small = (model.to("cuda", torch.bfloat16) for model in models)
    if kind == "n-gram":
        draft, nodes, least = NGramDraft(max_draft=3), 8, 1.2
    else:
        draft, nodes, least = draft_of(kind, small)
    if kind == "tree":
        draft.heads.to("cuda", torch.bfloat16)
    results = decode(target, prompts[:32], 16, NEW_ON_GPU, draft=draft, tree=nodes)
    target.to("cpu", torch.float32)
    small.to("cpu", torch.float32)
    assert 32 * NEW_ON_GPU / sum(result.steps for result in results) > least
    for prompt, result in zip(prompts, results, strict=False):
        with torch.no_grad():
            logits = target(torch.tensor([prompt + result.tokens])).logits[0, LENGTH - 1 : -1]
        chosen = logits.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        assert ((logits.amax(1) - chosen) <= 0.1 * logits.std(1)).all()
