"""score_text against a loop that predicts one token after the other."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import llama, one_thread
from torch import Tensor
from torch.nn import functional as F

from effllm.evaluation import score_text

__all__ = ["llama", "one_thread"]


@torch.no_grad()
def one_by_one(model: Any, ids: Tensor, context: int, stride: int) -> float:
    """Mean negative log-likelihood; each token is predicted in the first window that holds it."""
    total = 0.0
    for t in range(1, len(ids)):
        begin = 0
        while begin + context <= t:
            begin += stride
        logits = model(ids[None, begin:t]).logits[0, -1]
        total += float(F.cross_entropy(logits.double(), ids[t]))
    return total / (len(ids) - 1)


@pytest.mark.parametrize(
    ("tokens", "context", "stride"),
    [
        (50, 16, 8),
        (50, 16, 15),
        (49, 16, 8),
        (50, 7, 1),
        (16, 16, 8),
        (17, 16, 8),
        (9, 16, 3),
        (2, 2, 1),
    ],
)
def test_every_token_once(tokens: int, context: int, stride: int, llama: Any) -> None:
    ids = torch.arange(tokens) * 37 % 97
    score = score_text(llama, ids, context=context, stride=stride, batch_size=3)
    assert score.tokens == tokens - 1
    assert score.nll == pytest.approx(one_by_one(llama, ids, context, stride), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    assert score.tokens_per_s == pytest.approx(score.processed / score.seconds)
    assert score.processed >= tokens


def test_uniform_predictions_have_the_vocabulary_as_perplexity() -> None:
    class Uniform(torch.nn.Linear):
        def forward(self, ids: Tensor, use_cache: bool = True) -> Any:
            assert not use_cache
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 64))

    score = score_text(Uniform(1, 1), torch.arange(50), context=16)
    assert score.perplexity == pytest.approx(64)
    assert score.processed == 16 * 5 + 10  # stride 8: windows at 0, 8, .., 32, and a short one


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.ones(1), {"context": 4}, r"ids must be \[T\] with T >= 2, got \[1\]"),
        (torch.ones(1, 5), {"context": 4}, r"got \[1, 5\]"),
        (torch.ones(5), {"context": 1}, r"context must be at least 2 .*, got 1 and 1"),
        (torch.ones(5), {"context": 4, "stride": 4}, r"stride in 1\.\.context-1, got 4 and 4"),
        (torch.ones(5), {"context": 4, "stride": 0}, "got 4 and 0"),
    ],
)
def test_errors(ids: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_text(torch.nn.Linear(1, 1), ids, **options)
