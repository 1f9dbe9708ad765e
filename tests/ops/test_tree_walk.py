"""tree_verify's GPU kernel, proved without a GPU: its own header, on warps whose lanes take turns,
against the reference and the op on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm.ops import tree_verify
from effllm.testing import hostile
from effllm.testing.cases.tree_verify import CASES, TreeVerifyCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import check_values

MAX_LOGITS = 12_000
"""A lane's turn takes a microsecond."""

INF, NAN = torch.inf, torch.nan
Walks = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("tree_walk.cpp", tmp_path_factory.mktemp("tree_walk"))


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{}cta".format)
def walks(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Walks:
    """tree_verify as the GPU does it, by clusters of CTAs of two warps."""
    return walks_of(library, request.param)


def walks_of(library: ctypes.CDLL, num_ctas: int, warp_turns: int = 0) -> Walks:
    def call(
        *args: Tensor, draft_probs: Tensor | None = None, max_nodes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(args[5])
        results = tuple(
            hostile.poison_(torch.empty(shape, dtype=dtype))
            for shape, dtype in (
                ((count, max_nodes), torch.int32), ((count,), torch.int32), ((count,), torch.int64)
            )
        )  # fmt: skip
        tensors = (TensorArgument * 11)(*map(as_argument, [*args, draft_probs]))
        pointers = [ctypes.c_void_p(result.data_ptr()) for result in results]
        sizes = (ctypes.c_int64(max_nodes), num_ctas, warp_turns)
        library.tree_verify_walks(tensors, *sizes, *pointers)
        return results  # type: ignore[return-value]

    return call


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.num_trees * c.vocab <= MAX_LOGITS], ids=lambda case: case.id
)
def test_walks_are_those_of_the_reference(case: TreeVerifyCase, walks: Walks) -> None:
    check_values(walks, case, "cpu")


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        TreeVerifyCase,
        num_trees=st.integers(1, 3),
        num_nodes=st.integers(1, 16),
        vocab=st.integers(2, 300),
        temperature=st.sampled_from([0.0, 0.7, 1.0, 50.0]),
        top_k=st.sampled_from([0, 0, 1, 3, 100]),
        top_p=st.sampled_from([1.0, 1.0, 0.9, 0.4, 1e-6]),
        drawn=st.booleans(),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    )
)
def test_any_shape(case: TreeVerifyCase, walks: Walks) -> None:
    check_values(walks, case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 20, 1.0),  # of few candidates
        (1.0, 20, 0.7),
        (0.2, 0, 0.9),
        (1.0, 100, 1.0),  # more than groups of lanes have a maximum
        (1.0, 100, 0.7),
        (3.0, 0, 0.9),  # a law too flat for a list of candidates
        (0.5, 2500, 0.95),
    ],
)
def test_cuts_by_candidates_and_by_passes(
    temperature: float, top_k: int, top_p: float, dtype: torch.dtype, walks: Walks
) -> None:
    for drawn in (False, True):
        case = TreeVerifyCase(2, 6, 3001, temperature, top_k, top_p, drawn, dtype)
        check_values(walks, case, "cpu")


@pytest.mark.parametrize("num_ctas", [1, 2])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 20, 0.7), (1.0, 100, 1.0), (0.2, 0, 0.9), (3.0, 0, 0.9)],
)
def test_no_warp_overtakes_others(
    temperature: float, top_k: int, top_p: float, num_ctas: int, library: ctypes.CDLL
) -> None:
    walks = walks_of(library, num_ctas, warp_turns=500)
    for drawn in (False, True):
        case = TreeVerifyCase(3, 6, 3001, temperature, top_k, top_p, drawn, ragged=False)
        check_values(walks, case, "cpu")


def test_candidates_without_room(walks: Walks) -> None:
    """Likely tokens that lie in all lanes of a warp but two: the others say little of them."""
    case = TreeVerifyCase(1, 1, 3000, 1.0, 31, dtype=torch.bfloat16, ragged=False)
    args, kwargs = case.make("cpu")
    lane = torch.arange(3000) // 8 % 32
    args[0].add_((lane < 30) * 20.0)
    for seed in range(5):
        args[8].fill_(seed)
        for result, wanted in zip(
            walks(*args, **kwargs), tree_verify(*args, **kwargs), strict=True
        ):
            assert_equal(result, wanted)


@pytest.mark.parametrize("sampling", [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 9, 0.9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unaligned_rows(
    dtype: torch.dtype, sampling: tuple[float, int, float], walks: Walks
) -> None:
    args, kwargs = TreeVerifyCase(3, 5, 203, *sampling, drawn=True, dtype=dtype).make("cpu")
    wanted = tree_verify(*args, **kwargs)
    draft_probs = kwargs.pop("draft_probs")
    for name, logits in hostile.odd_strides(args[0]):
        if logits.stride(-1) != 1 or name == "expanded":
            continue
        odd_probs = dict(hostile.odd_strides(draft_probs))[name]
        results = walks(logits, *args[1:], draft_probs=odd_probs, **kwargs)
        for result, expected in zip(results, wanted, strict=True):
            assert_equal(result, expected, name=name)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (3, 0.6)])
@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 8,
        [-INF] * 4,
        [-INF, NAN, -INF, NAN],
        [1.0, INF, INF, NAN, -INF],
        [NAN, 2.0, -INF, NAN, 2.0],
        [-0.0, 0.0, -1e-30, -1.0],
        [3e38, 3e38, -3e38],
    ],
)
def test_ties_and_infinities(
    row: list[float], top_k: int, top_p: float, temperature: float, walks: Walks
) -> None:
    case = TreeVerifyCase(
        4, 5, len(row), temperature, top_k, top_p, dtype=torch.float32, ragged=False
    )
    args, kwargs = case.make("cpu")
    args[0].copy_(torch.tensor(row))
    for result, wanted in zip(walks(*args, **kwargs), tree_verify(*args, **kwargs), strict=True):
        assert_equal(result, wanted)


def test_a_law_that_rounding_leaves_nothing_of_is_taken_whole(walks: Walks) -> None:
    args, kwargs = TreeVerifyCase(1, 2, 3, drawn=True, ragged=False).make("cpu")
    args[0].copy_(torch.tensor([5.0, -INF, -INF]))
    args[1][1] = 1
    kwargs["draft_probs"].copy_(torch.tensor([1.0, 1e-30, 0.0]))
    accept_index, num_accepted, next_token = walks(*args, **kwargs)
    assert (accept_index.tolist(), num_accepted.item(), next_token.item()) == ([[0, -1]], 1, 0)


def test_data_out_of_range(walks: Walks) -> None:
    """What the CPU's op raises on: such a link is none, such a token is not accepted, and so on."""
    args, kwargs = TreeVerifyCase(6, 9, 40, dtype=torch.float32, ragged=False).make("cpu")
    sane = [tensor.clone() for tensor in args]
    wild = torch.tensor([0, -7, 2**31 - 1, 9, -1, 0, -7, 99, 9, -(2**31), 0], dtype=torch.int32)
    for link, sane_link in zip(args[2:4], sane[2:4], strict=True):
        link[::5] = wild
        node = torch.arange(len(link)) % 9
        sane_link.copy_(link.where((link > node) & (link < 9), -1))
    args[5][:3] = torch.tensor([NAN, -1.0, INF])
    sane[5][:3] = 0.0
    args[6][3], sane[6][3] = -5, 0
    args[7][3:] = torch.tensor([NAN, -1.0, 2.0])
    for result, wanted in zip(walks(*args, **kwargs), tree_verify(*sane, **kwargs), strict=True):
        assert_equal(result, wanted)
    # Tokens outside the vocabulary: as children that are never accepted, so nothing is.
    args, kwargs = TreeVerifyCase(6, 9, 40, dtype=torch.float32, ragged=False).make("cpu")
    args[1][::2], args[1][1::2] = -1, 40
    for mode in (0.0, 1.0):
        args[5].fill_(mode)
        assert walks(*args, **kwargs)[1].tolist() == [1] * 6
    # Trees outside the rows, that run backwards, or are larger than max_nodes.
    args[4].copy_(torch.tensor([-5, 9, 2, 30, 70, 99, 54]))
    accept_index, num_accepted, next_token = walks(*args, **kwargs)
    assert num_accepted.tolist() == [1, 0, 1, 1, 0, 0]
    assert ((next_token >= 0) & (next_token < 40)).all()
    assert accept_index[:, 1:].eq(-1).all()
