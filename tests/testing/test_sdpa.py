"""What benchmarks compare attention with computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from effllm.ops.paged_attention import paged_attention_ref
from effllm.testing.cases.paged_attention import BENCH, PagedAttentionCase
from effllm.testing.sdpa import prepare_sdpa

DECODE = PagedAttentionCase(((1, 70), (1, 70)), 4, 2, 64, 16, torch.float32)
CASES = [
    DECODE,
    replace(DECODE, sequences=((40, 40),)),
    replace(DECODE, sequences=((5, 70), (5, 70))),
    replace(DECODE, sequences=((1, 70), (1, 9), (0, 3), (3, 20))),
    *(
        replace(DECODE, **options)
        for options in (
            {"window": 20},
            {"window": 20, "sink_tokens": 3},
            {"window": 7, "sequences": ((30, 30),)},
            {"sinks": True},
            {"alibi": True},
            {"per_head": True},
            {"split_size": 64},
            {"kv_dtype": "int4"},
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values(case: PagedAttentionCase) -> None:
    args, kwargs = case.make("cpu")
    outs = prepare_sdpa(*args, **kwargs)()
    expected = paged_attention_ref(*args, **kwargs)[0].float()
    group = case.num_q_heads // case.num_kv_heads
    if case.per_head:  # one head of one sequence each
        outs = [torch.cat(outs[i : i + 2], 1) for i in range(0, len(outs), 2)]
        assert outs[0].shape[1] == 2 * group
    found = torch.cat([rows for out in outs for rows in out.transpose(1, 2)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_benchmarks_time_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: a reference in float64 is no baseline."""
    taken: list[Any] = []
    module = "effllm.testing.cases.paged_attention.prepare_sdpa"
    monkeypatch.setattr(module, lambda *args, **kwargs: taken.append(kwargs))
    for case in BENCH:
        case.prepare_baseline(None)
    assert len(taken) == len(BENCH)


def test_a_softcap_is_refused() -> None:
    args, kwargs = replace(DECODE, softcap=5.0).make("cpu")
    with pytest.raises(ValueError, match=r"softcap must be 0, got 5\.0"):
        prepare_sdpa(*args, **kwargs)
