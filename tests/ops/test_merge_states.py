"""merge_states beyond the contract's cases: whole attention in parts, edges, layouts, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import merge_states, paged_attention
from effllm.testing import hostile
from effllm.testing.cases.merge_states import MergeStatesCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import check_values

CASE = MergeStatesCase(3, 7, 4, 64, torch.float16)
INF, NAN = math.inf, math.nan


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v and its lse, in float64. q [T, H, D], k and v [S, H, D]."""
    scores = torch.einsum("qhd,khd->qhk", q.double(), k.double())
    out = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v.double())
    return out, scores.logsumexp(-1)


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        MergeStatesCase,
        num_states=st.integers(1, 32),
        num_tokens=st.integers(0, 9),
        num_heads=st.integers(1, 5),
        head_dim=st.integers(1, 40),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        empty=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    )
)
def test_any_shape(case: MergeStatesCase) -> None:
    check_values(merge_states, case, "cpu")


def test_attention_in_parts_is_whole_attention(device: str) -> None:
    """Keys cut anywhere, parts in any order, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 3, 16, generator=generator) for n in (5, 23, 23))
    whole_out, whole_lse = attention(q, k, v)
    for cuts in ((0, 23), (0, 1, 23), (0, 7, 7, 22, 23), tuple(range(24))):
        parts = [attention(q, k[a:b], v[a:b]) for a, b in itertools.pairwise(cuts)]
        outs = [out.float().to(device) for out, _ in parts][::-1]
        lses = [lse.float().to(device) for _, lse in parts][::-1]
        out, lse = merge_states(outs, lses)
        torch.testing.assert_close(out.cpu().double(), whole_out, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse.cpu().double(), whole_lse, atol=2e-6, rtol=2e-6)


def test_a_shared_prefix_read_once(device: str) -> None:
    """Two calls of paged_attention and a merge against one call over tables with the prefix."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    k, v, q = (
        hostile.normal(*shape, dtype=dtype, device=device, seed=seed, outliers=0.0)
        for seed, shape in enumerate([(12, 4, 2, 64), (12, 4, 2, 64), (5, 4, 64)])
    )

    def int32(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    # Three sequences of 3, 0 and 6 own keys, with 1, 1 and 3 query tokens, over 8 shared keys.
    cu_seqlens_q, own_lens = int32(0, 1, 2, 5), int32(3, 0, 6)
    own_pages = int32([4, 0], [0, 0], [5, 6])
    prefix_pages = int32([9, 2])
    whole_pages = torch.cat([prefix_pages.expand(3, 2), own_pages], 1)
    # The second sequence's one query stands at the prefix's last key, which is its own.
    expected = paged_attention(q, k, v, whole_pages, own_lens + 8, cu_seqlens_q, max_seqlen_q=3)
    shared = paged_attention(
        q, k, v, prefix_pages, int32(8), int32(0, 5), max_seqlen_q=5, causal=False
    )
    own = paged_attention(q, k, v, own_pages, own_lens, cu_seqlens_q, max_seqlen_q=3)
    assert own[1][1].tolist() == [-INF] * 4
    out, lse = merge_states((shared[0], own[0]), (shared[1], own[1]))
    tolerance = 1e-5 if device == "cpu" else 4e-3
    torch.testing.assert_close(out, expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected[1], atol=1e-4, rtol=1e-5)


def row(
    *values: tuple[float, float], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """One row of one element merged from (out, lse) pairs, as Python numbers."""
    outs = [torch.full((1, 1, 1), o, dtype=dtype, device=device) for o, _ in values]
    lses = [torch.full((1, 1), lse, device=device) for _, lse in values]
    out, lse = merge_states(outs, lses)
    return out.item(), lse.item()


def test_edges_of_the_logarithm(device: str) -> None:
    def merge(*values: tuple[float, float]) -> Any:
        return row(*values, device=device)

    assert merge((NAN, -INF), (NAN, -INF)) == (0.0, -INF)
    assert merge((NAN, -INF)) == (0.0, -INF)
    # An empty state's row, whatever it holds, leaves the other as it is, to the bit.
    for junk in (NAN, INF, 7.0):
        assert merge((0.3, 1.7), (junk, -INF)) == merge((0.3, 1.7))
        assert merge((junk, -INF), (0.3, 1.7)) == merge((0.3, 1.7))
    # Sizes beyond what their exponentials could hold, and weights that vanish.
    assert merge((1.0, 3e38), (5.0, -3e38)) == (1.0, pytest.approx(3e38))
    assert merge((1.0, -1e4), (3.0, -1e4)) == (2.0, pytest.approx(-1e4 + math.log(2), abs=1e-3))
    assert merge((1.0, 0.0), (2.0, 0.0)) == (1.5, pytest.approx(math.log(2)))
    for bad in (NAN, INF):
        assert all(math.isnan(x) for x in merge((1.0, bad), (2.0, 0.0)))
        assert all(math.isnan(x) for x in merge((2.0, 0.0), (1.0, bad)))
    # A NaN that has keys behind it is not lost.
    assert math.isnan(merge((NAN, -50.0), (2.0, 0.0))[0])


def test_every_kind_of_strides(device: str) -> None:
    (outs, lses), _ = CASE.make(device)
    for name, tensor in hostile.odd_strides(outs[1]):
        if tensor.stride(-1) == 1:
            dense = [outs[0], tensor.contiguous(), outs[2]]
            for a, b in zip(
                merge_states([outs[0], tensor, outs[2]], lses),
                merge_states(dense, lses),
                strict=True,
            ):
                assert_equal(a, b, name=name)
    for name, tensor in hostile.odd_strides(lses[1]):
        given = merge_states(outs, [lses[0], tensor, lses[2]])
        for a, b in zip(
            given, merge_states(outs, [lses[0], tensor.contiguous(), lses[2]]), strict=True
        ):
            assert_equal(a, b, name=name)


def test_results_are_the_same_every_time_and_in_any_batch(device: str) -> None:
    (outs, lses), _ = MergeStatesCase(8, 33, 4, 64).make(device)
    first = merge_states(outs, lses)
    for _ in range(3):
        assert_equal(merge_states(outs, lses)[0], first[0])
    alone = merge_states([out[20:21] for out in outs], [lse[20:21] for lse in lses])
    assert_equal(alone[0], first[0][20:21])
    assert_equal(alone[1], first[1][20:21])


def test_states_beyond_32_bit_offsets(device: str) -> None:
    """Two tokens that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((2, 1, 32), (2**31, 32, 1))
    far.copy_(hostile.normal(2, 1, 32, seed=1))
    near = hostile.normal(2, 1, 32, dtype=torch.bfloat16, device=device, seed=2)
    lses = [torch.zeros(2, 1, device=device), torch.ones(2, 1, device=device)]
    out, _ = merge_states([far, near], lses)
    assert_equal(out, merge_states([far.clone(), near], lses)[0])


@pytest.mark.gpu
def test_first_call_in_a_cuda_graph_and_replay_with_other_states() -> None:
    (outs, lses), _ = CASE.make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = merge_states(outs, lses)
    lses[0].fill_(-INF)
    outs[1].copy_(hostile.normal(*outs[1].shape, dtype=outs[1].dtype, seed=9))
    lses[1].fill_(2.0)
    graph.replay()
    for got, expected in zip(results, merge_states(outs, lses), strict=True):
        assert_equal(got, expected)


@pytest.mark.gpu
def test_gpu_and_cpu_agree() -> None:
    (outs, lses), _ = MergeStatesCase(5, 40, 8, 128).make("cpu")
    expected = merge_states(outs, lses)
    got = merge_states([out.cuda() for out in outs], [lse.cuda() for lse in lses])
    torch.testing.assert_close(got[0].cpu(), expected[0], atol=1e-4, rtol=2**-7)
    torch.testing.assert_close(got[1].cpu(), expected[1], atol=1e-5, rtol=1e-6)


def states(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


OUT, LSE = (7, 4, 64), (7, 4)
ERRORS = [
    (
        [*states(OUT)] * 33,
        [*states(LSE, dtype=torch.float32)] * 33,
        "outs must hold 1 to 32 .*got 33",
    ),
    (states(OUT, OUT), states(LSE), "lses must hold as many tensors as outs, 2, got 1"),
    (states(OUT, dtype=torch.int32), states(LSE), "outs.0. must be float16, .*, got int32"),
    (states((7, 4)), states(LSE), r"outs.0. must be \[T, HQ, D\] = .*, got \[7, 4\]"),
    (states((7, 4, 0)), [torch.ones(LSE)], "outs must have a head dim of at least 1, got 0"),
    (states(OUT), states(LSE), "lses.0. must be float32, got float16"),
    (states(OUT), [torch.ones(7, 5)], r"lses.0. must be \[T, HQ\] = \[7, 4\], got \[7, 5\]"),
    (
        [*states(OUT), *states(OUT, dtype=torch.bfloat16)],
        [torch.ones(LSE)] * 2,
        "outs.1. must be float16, got bfloat16",
    ),
    (
        states(OUT, (7, 4, 32)),
        [torch.ones(LSE)] * 2,
        r"outs.1. must be \[T, HQ, D\] = \[7, 4, 64\], got \[7, 4, 32\]",
    ),
    (
        [torch.ones(7, 64, 4).transpose(1, 2)],
        [torch.ones(LSE)],
        "outs.0. must have stride 1 in its last dimension",
    ),
]


@pytest.mark.parametrize(("outs", "lses", "message"), ERRORS)
def test_errors(outs: list[Tensor], lses: list[Tensor], message: str, device: str) -> None:
    if device == "cuda":  # with the strides that they have
        outs = [out.cuda() if out.is_contiguous() else out.mT.cuda().mT for out in outs]
        lses = [lse.cuda() for lse in lses]
    with pytest.raises(RuntimeError, match=f"effllm::merge_states: {message}"):
        merge_states(outs, lses)


def test_no_states_are_an_error() -> None:
    for lses in ([], [torch.ones(LSE)]):
        with pytest.raises(RuntimeError, match=r"effllm::merge_states: outs must hold .*, got 0$"):
            merge_states([], lses)


@pytest.mark.gpu
def test_mixed_devices_are_a_named_error() -> None:
    (outs, lses), _ = CASE.make("cuda")
    with pytest.raises(RuntimeError, match=r"lses.1. must be on cuda:0 as outs.0. is, got cpu"):
        merge_states(outs, [lses[0], lses[1].cpu(), lses[2]])
