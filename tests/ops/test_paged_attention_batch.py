"""With a split size, a row's bits are those of its sequence, whatever batch it is in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import paged_attention
from effllm.testing.cases.paged_attention import PagedAttentionCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import bind, schema_of

Results = tuple[Tensor, Tensor]
BY_SEQUENCE = ("page_table", "seq_lens")


def batch_of(args: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The sequences of a call in another order, or some of them."""
    starts = args["cu_seqlens_q"].tolist()
    queries = [range(starts[index], starts[index + 1]) for index in order]
    counts = torch.tensor([0] + [len(tokens) for tokens in queries])
    return (
        args
        | {name: args[name][order] for name in BY_SEQUENCE}
        | {
            "q": args["q"][[token for tokens in queries for token in tokens]],
            "cu_seqlens_q": counts.cumsum(0).to(args["cu_seqlens_q"]),
            "max_seqlen_q": int(counts.max()),
        }
    )


def of_sequence(results: Results, args: dict[str, Any], index: int) -> Results:
    first, end = args["cu_seqlens_q"].tolist()[index : index + 2]
    return results[0][first:end], results[1][first:end]


def assert_same_bits(results: Results, expected: Results) -> None:
    for actual, wanted in zip(results, expected, strict=True):
        assert_equal(actual, wanted)


# Of each sequence under test another batch is made: one, two and three tokens, a prompt.
TESTED = ((1, 1500), (2, 700), (3, 64), (40, 300))
OTHERS = tuple((1, 1 + 53 * index % 900) for index in range(60))
OPTIONS = [
    {},
    {"window": 200},
    {"window": 200, "sink_tokens": 130},
    {"kv_dtype": "int8"},
    {"kv_dtype": "int4", "head_dim": 64},
    {"num_kv_heads": 8, "head_dim": 256},
    {"per_head": True, "sinks": True, "alibi": True},
]


def make(device: str, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    case = PagedAttentionCase(TESTED + OTHERS, **settings | {"split_size": 128} | options)
    return bind(schema_of("paged_attention"), *case.make(device))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_alone_among_others_and_elsewhere(options: dict[str, Any], device: str) -> None:
    args = make(device, **options)
    whole = paged_attention(**args)
    count = len(TESTED + OTHERS)
    turned = [*range(7, count), *range(7)]
    turned_args = batch_of(args, turned)
    turned_whole = paged_attention(**turned_args)
    for index in range(len(TESTED)):
        alone = paged_attention(**batch_of(args, [index]))
        assert_same_bits(of_sequence(whole, args, index), alone)
        assert_same_bits(of_sequence(turned_whole, turned_args, turned.index(index)), alone)
        # Among few that are as short, where each GPU would cut it into more parts.
        pair_args = batch_of(args, [len(TESTED), index])
        assert_same_bits(of_sequence(paged_attention(**pair_args), pair_args, 1), alone)


@pytest.mark.parametrize("split_size", [64, 192, 4096])
def test_bounds_of_the_batch_do_not_show(split_size: int, device: str) -> None:
    """Room for more pages and queries than there are, and tokens of no sequence."""
    args = make(device, split_size=split_size) | {"window": None}
    args = batch_of(args, [0, 1, 2])
    expected = paged_attention(**args)
    for index in range(3):
        assert_same_bits(
            of_sequence(expected, args, index), paged_attention(**batch_of(args, [index]))
        )
    roomy = args | {
        "page_table": torch.nn.functional.pad(args["page_table"], (0, 500), value=-1),
        "q": torch.nn.functional.pad(args["q"], (0, 0, 0, 0, 0, 5)),
        "max_seqlen_q": 64,
    }
    out, lse = paged_attention(**roomy)
    assert_same_bits((out[:-5], lse[:-5]), expected)
    assert (out[-5:] == 0).all()
    assert (lse[-5:] == -torch.inf).all()


@pytest.mark.gpu
def test_a_replayed_graph_gives_the_same_bits() -> None:
    """Captured at other lengths, of both kernels: pieces are cut where they are."""
    args = make("cuda")
    lengths = args["seq_lens"].clone()
    args["seq_lens"].fill_(64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = paged_attention(**args)
    args["seq_lens"].copy_(lengths)
    for _ in range(20):
        graph.replay()
        for index in range(len(TESTED)):
            assert_same_bits(
                of_sequence(results, args, index), paged_attention(**batch_of(args, [index]))
            )


@pytest.mark.gpu
def test_more_pieces_than_a_merge_can_count_are_a_named_error() -> None:
    args = make("cuda")
    args = batch_of(args, [0]) | {"split_size": 64}
    room = 65536 * 64 // 16 - args["page_table"].shape[1]
    args["page_table"] = torch.nn.functional.pad(args["page_table"], (0, room), value=-1)
    message = r"split_size must make at most 65535 pieces of MAXP \* P = 4194304 keys, got 64"
    with pytest.raises(RuntimeError, match=message):
        paged_attention(**args)
    assert paged_attention(**args | {"split_size": 128})[0].isfinite().all()
