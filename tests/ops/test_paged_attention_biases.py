"""Attention sinks and ALiBi, against a plain softmax over a dense matrix of scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import paged_attention
from effllm.testing.cases.paged_attention import PagedAttentionCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import bind, schema_of

FLT_MAX = torch.finfo(torch.float32).max
HEADS = 4


def one_sequence(queries: int, keys: int, device: str, **options: Any) -> dict[str, Any]:
    """Of one sequence, in pages of 16 that stand in the order of its keys."""
    generator = torch.Generator().manual_seed(keys)
    num_pages = -(-keys // 16)
    q, k, v = (
        torch.randn(*shape, 64, generator=generator).half().to(device)
        for shape in ((queries, HEADS), (num_pages, 16, 2), (num_pages, 16, 2))
    )
    int32 = {"dtype": torch.int32, "device": device}
    return {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "page_table": torch.arange(num_pages, **int32)[None],
        "seq_lens": torch.tensor([keys], **int32),
        "cu_seqlens_q": torch.tensor([0, queries], **int32),
        "max_seqlen_q": queries,
        **options,
    }


def dense(args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [HQ, T, S] in float64, -inf where masked; values [HQ, S, D]; distances [T, S]."""
    queries, keys = len(args["q"]), int(args["seq_lens"])
    k, v = (
        args[name].flatten(0, 1)[:keys].double().repeat_interleave(2, dim=1).transpose(0, 1)
        for name in ("k_cache", "v_cache")
    )
    scores = args["q"].double().transpose(0, 1) @ k.mT / 8
    device = scores.device
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = position - torch.arange(keys, device=device)
    if args.get("causal", True):
        scores = scores.masked_fill(distance < 0, -math.inf)
    return scores, v, distance


def named(case: PagedAttentionCase, device: str) -> dict[str, Any]:
    return bind(schema_of("paged_attention"), *case.make(device))


lengths = pytest.mark.parametrize(
    ("queries", "keys"), [(1, 40), (3, 40), (40, 40), (30, 90), (1, 1500)]
)


@lengths
def test_a_sink_is_a_column_of_the_softmax(queries: int, keys: int, device: str) -> None:
    args = one_sequence(queries, keys, device)
    sinks = torch.tensor([-30.0, 0.5, 6.0, 60.0], device=device)
    scores, values, _ = dense(args)
    column = sinks.double()[:, None, None].expand(HEADS, queries, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    out, lse = paged_attention(**args, sinks=sinks)
    expected = (weights @ values).transpose(0, 1)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 9, 40])
def test_sinks_that_are_no_numbers(queries: int, device: str) -> None:
    """No sink, one that takes all, one that spoils its head and no other."""
    args = named(PagedAttentionCase(((queries, 50), (2, 0)), HEADS, 2, 64, 16), device)
    plain, plain_lse = paged_attention(**args)
    sinks = torch.tensor([-math.inf, math.inf, math.nan, -math.inf], device=device)
    out, lse = paged_attention(**args, sinks=sinks)
    assert_equal(lse, plain_lse)
    assert_equal(out[:, [0, 3]], plain[:, [0, 3]])
    assert (out[:, 1] == 0).all()
    assert out[:queries, 2].isnan().all()
    assert (out[queries:] == 0).all()  # a row without keys stays 0


@lengths
@pytest.mark.parametrize("causal", [True, False])
def test_a_slope_counts_positions(queries: int, keys: int, causal: bool, device: str) -> None:
    args = one_sequence(queries, keys, device, causal=causal)
    slopes = torch.tensor([0.5, 0.25, 2.0**-8, -0.001], device=device)
    scores, values, distance = dense(args)
    scores = scores - slopes.double()[:, None, None] * distance.abs()
    out, lse = paged_attention(**args, alibi_slopes=slopes)
    expected = (scores.softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 7, 40])
@pytest.mark.parametrize("slope", [1e5, 1e30, FLT_MAX])
def test_with_a_huge_slope_a_query_sees_itself_alone(
    queries: int, slope: float, device: str
) -> None:
    args = one_sequence(queries, 60, device)
    out, lse = paged_attention(**args, alibi_slopes=torch.full((HEADS,), slope, device=device))
    scores, values, _ = dense(args)
    own = scores.diagonal(60 - queries, 1, 2).T
    assert_equal(out, values.transpose(0, 1)[-queries:].half())
    torch.testing.assert_close(lse.double(), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 40])
def test_slopes_of_zero_change_no_bit(queries: int, device: str) -> None:
    args = one_sequence(queries, 70, device, softcap=3.0, window=33)
    slopes = torch.zeros(HEADS, device=device)
    for actual, wanted in zip(
        paged_attention(**args, alibi_slopes=slopes), paged_attention(**args), strict=True
    ):
        assert_equal(actual, wanted)


def test_heads_have_slopes_and_sinks_of_their_own(device: str) -> None:
    """A head alone gives what it gives among others: none has its neighbour's."""
    biases = {
        "sinks": torch.tensor([0.0, 3.0, -2.0, 5.0], device=device),
        "alibi_slopes": torch.tensor([0.1, 0.4, 0.02, 1.0], device=device),
    }
    for queries in (2, 40):
        args = one_sequence(queries, 80, device)
        out, lse = paged_attention(**args, **biases)
        for head in range(HEADS):
            kv_heads = slice(head // 2, head // 2 + 1)
            alone = args | {
                "q": args["q"][:, head : head + 1],
                "k_cache": args["k_cache"][:, :, kv_heads],
                "v_cache": args["v_cache"][:, :, kv_heads],
                **{name: bias[head : head + 1] for name, bias in biases.items()},
            }
            of_head, lse_of_head = paged_attention(**alone)
            torch.testing.assert_close(of_head[:, 0], out[:, head], rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(lse_of_head[:, 0], lse[:, head], rtol=1e-5, atol=1e-5)
