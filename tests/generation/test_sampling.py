"""Sampling.choose against distributions worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from effllm.generation.sampling import Sampling

PROBS = [0.5, 0.3, 0.15, 0.05]
LOGITS = torch.tensor([math.log(p) for p in [0.15, 0.5, 0.05, 0.3]])  # tokens 1, 3, 0, 2 by weight


def at(draw: float, **options: float) -> int:
    return int(Sampling(**{"temperature": 1.0, **options}).choose(LOGITS[None], [draw]))


def test_draws_cut_the_distribution_in_order() -> None:
    assert [at(d) for d in (0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 1 - 1e-16)] == [
        1, 1, 3, 3, 0, 0, 2, 2,
    ]  # fmt: skip


def test_top_k_and_top_p_renormalise() -> None:
    # k = 2: 0.5 and 0.3 become 0.625 and 0.375
    assert [at(d, top_k=2) for d in (0.0, 0.62, 0.63, 1 - 1e-16)] == [1, 1, 3, 3]
    # the fewest tokens that reach 0.79 are two, those that reach 0.81 are three
    assert at(1 - 1e-16, top_p=0.79) == 3
    assert at(1 - 1e-16, top_p=0.81) == 0
    assert at(1 - 1e-16, top_p=0.01) == 1
    assert at(1 - 1e-16, top_k=2, top_p=1.0) == 3


def test_temperature_sharpens() -> None:
    # T = 0.5 squares the probabilities: 0.25 of 0.365 for the first
    assert at(0.68, temperature=0.5) == 1
    assert at(0.69, temperature=0.5) == 3


def test_histogram_follows_softmax() -> None:
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0)).tolist()
    tokens = Sampling(1.0).choose(LOGITS.expand(len(draws), -1), draws)
    frequency = tokens.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(frequency, LOGITS.exp(), atol=0.015, rtol=0)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]])
    assert {int(Sampling(1.0).choose(logits, [d / 64])) for d in range(64)} == {1, 3}
    assert int(Sampling(1.0).choose(logits, [1 - 1e-16])) == 3


def test_greedy() -> None:
    for temperature in (None, 0.0):
        assert Sampling(temperature).choose(LOGITS[None], [0.99]).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be >= 0, got nan"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
