"""Policies of what a cache keeps: their arguments, and which tokens they let go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effllm.cache import H2O, TOVA, EvictingKVCache, Full, SnapKV, StreamingLLM


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(16, 0), "H2O: recent and window must be at least 1"),
        (lambda: H2O(16, 10, 7), "H2O: budget must be at least 17, got 16"),
        (lambda: H2O(16, 4, -1), "H2O: .* n_sink 0"),
        (lambda: StreamingLLM(-1, 4), "StreamingLLM: n_sink must be at least 0"),
        (lambda: StreamingLLM(4, 0), "window at least 1, got 4 and 0"),
        (lambda: SnapKV(8, 9), "SnapKV: budget must be at least 9, got 8"),
        (lambda: SnapKV(8, 4, kernel=4), "SnapKV: kernel must be odd"),
        (lambda: SnapKV(8, 4, pooling="sum"), "pooling 'max' or 'avg', got 7 and 'sum'"),
        (lambda: TOVA(0), "TOVA: budget must be at least 1, got 0"),
        (lambda: EvictingKVCache(Full(), 1, 1, 8), "the policy must have a limit"),
    ],
)
def test_impossible_policies(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_normalised_scores_forget_how_long_a_key_was_seen() -> None:
    """Each query gave the same weight to all keys that it saw (bug class 68)."""
    positions = torch.arange(20, dtype=torch.int32).expand(2, -1)
    sums = 0.25 * (20 - positions).float()
    raw = H2O(12, 4).kept(positions, sums)
    assert raw.tolist() == [[*range(8), *range(16, 20)]] * 2  # the early ones had a head start
    even = H2O(12, 4, normalize=True).kept(positions, sums)
    assert even.tolist() == [[*range(8, 20)]] * 2  # all equal: the lowest positions go


def test_kept_survives_slots_in_any_order_and_hostile_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    positions = torch.stack([torch.randperm(30, generator=generator) for _ in range(2)]).int()
    scores = torch.zeros(2, 30)
    of_position = torch.tensor([0.0, -0.0, 5.0, float("nan"), float("inf"), 1.0])
    for head in range(2):
        for position, score in enumerate(of_position):
            scores[head, positions[head] == position + 4] = score
    kept = H2O(12, 6, 2).kept(positions, scores)
    # The first 2, the last 6, and of the others NaN, infinity, 5 and 1.
    expected = [0, 1, 6, 7, 8, 9, *range(24, 30)]
    assert positions.gather(1, kept).tolist() == [expected] * 2
