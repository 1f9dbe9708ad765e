"""h2o_append beyond the cases of the contract: who goes, what is reset, what stays, errors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm.ops import h2o_append
from effllm.ops.h2o_append import h2o_append_ref
from effllm.testing import hostile
from effllm.testing.cases.h2o_append import CASES, MIXED, H2oAppendCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import bind, check_values, schema_of

CASE = H2oAppendCase((5, 8, 9), 8, 3, 2, num_kv_heads=2, page_size=4, dtype=torch.float16)
WRITTEN = ("k_cache", "v_cache", "scores", "slot_pos", "seq_lens")


def named(case: H2oAppendCase, device: str) -> dict[str, Any]:
    return bind(schema_of("h2o_append"), *case.make(device))


def check(args: dict[str, Any]) -> None:
    expected = h2o_append_ref(**args)
    h2o_append(**args)
    for name, wanted in zip(WRITTEN, expected, strict=False):
        assert_equal(args[name], wanted, name=name)


def one_head(scores: list[float], tokens: list[int], device: str = "cpu") -> dict[str, Any]:
    """A head whose slots hold these scores and positions, in a page; the new row is 9."""
    slots = len(scores)
    return {
        "k": torch.full((1, 1, 8), 9.0, device=device),
        "v": torch.full((1, 1, 8), 9.0, device=device),
        "k_cache": torch.zeros(1, slots, 1, 8, device=device),
        "v_cache": torch.zeros(1, slots, 1, 8, device=device),
        "scores": torch.tensor([[scores]], dtype=torch.float32, device=device),
        "slot_pos": torch.tensor([[tokens]], dtype=torch.int32, device=device),
        "seq_lens": torch.full((1, 1), slots, dtype=torch.int32, device=device),
        "page_table": torch.zeros(1, 1, 1, dtype=torch.int32, device=device),
        "positions": torch.tensor([20], device=device),
    }


def slot_of(args: dict[str, Any], **options: Any) -> int:
    """Which slot the new token took, with all that must have changed there."""
    h2o_append(**args, **options)
    slot = int((args["slot_pos"] == 20).nonzero()[0, 2])
    assert args["scores"][0, 0, slot] == 0
    for cache in (args["k_cache"], args["v_cache"]):
        assert (cache[0, :, 0, 0] == 9).nonzero().flatten().tolist() == [slot]
    return slot


@settings(max_examples=60, deadline=None)
@given(
    case=st.builds(
        H2oAppendCase,
        st.lists(st.integers(0, 40), max_size=5).map(tuple),
        budget=st.integers(5, 30).map(lambda budget: min(budget, 2 + 30)),
        recent=st.integers(0, 40),
        n_sink=st.integers(0, 4),
        normalize=st.booleans(),
        num_kv_heads=st.integers(1, 4),
        head_dim=st.integers(1, 20),
        page_size=st.integers(1, 20),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        skip_every=st.sampled_from([None, 2, 3]),
        shared=st.booleans(),
    ),
    seed=st.integers(0, 5),
)
def test_any_problem(case: H2oAppendCase, seed: int) -> None:
    args, kwargs = case.make("cpu", seed)
    bound = bind(schema_of("h2o_append"), args, kwargs)
    bound["budget"] = min(bound["budget"], bound["scores"].shape[2])
    bound["n_sink"] = min(bound["n_sink"], bound["budget"] - 1)
    check(bound)


@pytest.mark.parametrize(
    ("scores", "tokens", "options", "slot"),
    [
        # The lowest score; of equal ones the lowest position, wherever it lies.
        ([3.0, 1.0, 2.0, 5.0], [0, 5, 2, 9], {"recent": 1}, 1),
        ([1.0, 1.0, 2.0, 1.0], [7, 5, 2, 3], {"recent": 1}, 3),
        ([0.0, 0.0, -0.0, 0.0], [7, 5, 2, 3], {"recent": 1}, 2),
        # Protected, by position: the last tokens, the new one (20) included, and the first.
        ([3.0, 1.0, 0.0, 0.0], [3, 4, 19, 18], {"recent": 3}, 1),
        ([3.0, 1.0, 0.0, 0.0], [3, 4, 19, 18], {"recent": 2}, 3),
        ([0.0, 1.0, 2.0, 0.0], [0, 4, 5, 1], {"recent": 1, "n_sink": 2}, 1),
        ([0.0, 1.0, 2.0, 0.0], [0, 4, 5, 1], {"recent": 1, "n_sink": 1}, 3),
        # Where none may go: the oldest behind the first ones, whatever its score, else the oldest.
        ([0.0, 9.0, 1.0, 0.0], [0, 17, 18, 19], {"recent": 8, "n_sink": 1}, 1),
        ([9.0, 9.0, 1.0, 0.0], [2, 1, 0, 25], {"recent": 8, "n_sink": 3}, 3),
        ([9.0, 9.0, 1.0], [2, 0, 1], {"recent": 8, "n_sink": 2}, 0),
        # Negative numbers and infinities are scores, NaN is above them all.
        ([-1.0, -2.0, 0.0, 1.0], [1, 2, 3, 4], {"recent": 1}, 1),
        ([-math.inf, -2.0, math.inf], [1, 2, 3], {"recent": 1}, 0),
        ([math.nan, math.inf, math.nan], [1, 2, 3], {"recent": 1}, 1),
        ([math.nan, math.nan, math.nan], [3, 1, 2], {"recent": 1}, 1),
        ([-math.nan, 5.0, 6.0], [1, 2, 3], {"recent": 1}, 1),
        # A long life, or a short one: 6 over 18 queries against 1 over 2.
        ([6.0, 1.0, 9.0], [2, 18, 3], {"recent": 1}, 1),
        ([6.0, 1.0, 9.0], [2, 18, 3], {"recent": 1, "normalize": True}, 0),
        # A budget of one slot.
        ([6.0], [2], {"recent": 5}, 0),
    ],
)
def test_who_goes(
    scores: list[float], tokens: list[int], options: dict[str, Any], slot: int, device: str
) -> None:
    args = one_head(scores, tokens, device)
    assert slot_of(args, **options) == slot
    assert args["seq_lens"].item() == len(scores)


@pytest.mark.parametrize("num_slots", [1, 33, 4096])
@pytest.mark.parametrize("place", ["first", "last", "middle"])
def test_the_lowest_is_found_wherever_it_lies(num_slots: int, place: str, device: str) -> None:
    slot = {"first": 0, "last": num_slots - 1, "middle": num_slots // 2}[place]
    scores = [2.0] * num_slots
    scores[slot] = 1.0
    tokens = [20 + 2 + (7 * i) % num_slots for i in range(num_slots)]
    args = one_head(scores, tokens, device)
    args["positions"].fill_(10**6)
    h2o_append(**args, recent=1)
    assert args["slot_pos"][0, 0, slot] == 10**6
    assert (args["slot_pos"] == 10**6).sum() == 1


def test_uniform_attention_is_even_once_normalised() -> None:
    """Raw sums favour early tokens: of causal attention that is the same for all keys, normalised
    by the queries that saw them, all keys have the same score and the oldest goes."""
    queries = 12
    weights = torch.ones(queries, queries).tril() / torch.arange(1, queries + 1)[:, None]
    scores = weights.sum(0)
    assert scores.argmin() == queries - 1
    even = torch.arange(queries, 0, -1).float() / 4  # a quarter from each query that sees the key
    args = one_head(even.tolist(), list(range(queries)))
    args["positions"].fill_(queries)
    h2o_append(**args, recent=1, normalize=True)
    assert args["slot_pos"][0, 0, 0] == queries


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_many_evictions_in_a_row(kv_dtype: str | None, device: str) -> None:
    """Heads that go their own ways: after each of 300 tokens the state is the reference's, heads
    hold the last tokens and the first, and the next position is that of the text."""
    budget, recent, n_sink = 24, 6, 3
    case = H2oAppendCase((0, 20), budget, recent, n_sink, page_size=8, kv_dtype=kv_dtype)
    args = named(case, device)
    names = ("scores", "slot_pos")
    for name in names:  # room for the budget
        args[name] = torch.zeros(2, 3, budget, device=device).to(args[name].dtype)
    args["seq_lens"].zero_()
    pages = torch.randperm(18, device=device).to(torch.int32)
    args["page_table"] = pages.view(2, 3, 3)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if name in args:
            args[name] = args[name][:1].expand(18, *args[name].shape[1:]).contiguous()
    generator = torch.Generator().manual_seed(0)
    for position in range(300):
        args["positions"].fill_(position)
        for name in ("k", "v"):
            args[name] = torch.randn(2, 3, 64, generator=generator).to(args[name])
        check(args)
        kept = args["slot_pos"][..., : min(position + 1, budget)]
        for head in kept.flatten(0, 1).tolist():
            assert len(set(head)) == len(head)
            last = set(range(max(position - recent + 1, 0), position + 1))
            assert last | set(range(min(n_sink, position + 1))) <= set(head)
        assert (args["seq_lens"] == min(position + 1, budget)).all()
        added = (torch.rand(2, 3, budget, generator=generator) > 0.9).float().to(device)
        args["scores"][..., : position + 1] += added[..., : position + 1]
    heads = [frozenset(head) for head in args["slot_pos"].flatten(0, 1).tolist()]
    assert len(set(heads)) == 6


def test_scores_that_are_zero_keep_the_first_tokens_and_a_window(device: str) -> None:
    """StreamingLLM."""
    case = H2oAppendCase((0,), 16, 1, 4, num_kv_heads=1, page_size=16)
    args = named(case, device)
    args["scores"] = torch.zeros(1, 1, 16, device=device)
    args["slot_pos"] = torch.zeros(1, 1, 16, dtype=torch.int32, device=device)
    for position in range(100):
        args["positions"].fill_(position)
        h2o_append(**args)
    kept = sorted(args["slot_pos"].flatten().tolist())
    assert kept == [0, 1, 2, 3, *range(88, 100)]


@pytest.mark.parametrize("index", range(9), ids=["k", "v", *WRITTEN, "page_table", "positions"])
def test_any_strides(index: int, device: str) -> None:
    name = ("k", "v", *WRITTEN, "page_table", "positions")[index]
    for layout, tensor in hostile.odd_strides(named(CASE, device)[name]):
        written_twice = name in WRITTEN and layout == "expanded"
        one_cache_for_many = name == "page_table" and layout == "expanded"
        if written_twice or one_cache_for_many or tensor.stride(-1) != 1:
            continue
        check(named(CASE, device) | {name: tensor})


@pytest.mark.sanitizer
@pytest.mark.parametrize("dim", [5, 64])
def test_nothing_is_written_beside_what_is_its_own(dim: int, device: str) -> None:
    case = H2oAppendCase((3, 8, 4), 8, 2, num_kv_heads=2, head_dim=dim, page_size=4)
    args, checks = named(case, device), []
    for name in WRITTEN:
        tensor = args[name][..., :8] if name in ("scores", "slot_pos") else args[name]
        args[name], checked = hostile.guarded(tensor)
        checks.append(checked)
    check(args)
    for checked in checks:
        checked()


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.float32, device=device)
    args = one_head([1.0], [3], device)
    for index, name in enumerate(("k_cache", "v_cache")):
        args[name] = memory.as_strided((2, 1, 1, 8), (2**31, 8, 8, 1), 8 * index)
        args[name][1].zero_()
    args["page_table"].fill_(1)
    h2o_append(**args, recent=1)
    for name in ("k_cache", "v_cache"):
        assert (args[name][1] == 9).all()


def test_a_head_without_a_new_token_keeps_all_it_has(device: str) -> None:
    args = named(CASE, device)
    args["positions"][1] = -1
    args["seq_lens"][1] = -7  # not looked at
    before = {name: args[name].clone() for name in WRITTEN}
    check(args)
    for name in WRITTEN[2:]:
        assert_equal(args[name][1], before[name][1], name=name)


def wrong(**changes: Any) -> dict[str, Any]:
    return named(CASE, "cpu") | changes


HALF = torch.float16
ERRORS = [
    (
        wrong(k=torch.ones(3, 2, 64, dtype=torch.int32)),
        "k must be float16, bfloat16 or float32, got int32",
    ),
    (wrong(k=torch.ones(3, 128, dtype=HALF)), r"k must be \[B, HKV, D\] = .*, got \[3, 128\]"),
    (wrong(v=torch.ones(3, 2, 64)), "v must be float16, got float32"),
    (
        wrong(k_cache=torch.ones(4, 4, 3, 64, dtype=HALF)),
        r"k_cache must be \[NP, P, HKV, D\] = \[4, 4, 2, 64\], got \[4, 4, 3, 64\]",
    ),
    (wrong(scores=torch.ones(3, 2, 11, dtype=HALF)), "scores must be float32, got float16"),
    (
        wrong(scores=torch.ones(3, 1, 11)),
        r"scores must be \[B, HKV, S\] = \[3, 2, \?\], got \[3, 1, 11\]",
    ),
    (wrong(scores=torch.ones(3, 11, 2).mT), "scores must have stride 1 in its last dimension"),
    (wrong(slot_pos=torch.ones(3, 2, 11).long()), "slot_pos must be int32, got int64"),
    (
        wrong(slot_pos=torch.ones(3, 2, 9, dtype=torch.int32)),
        r"slot_pos must be \[B, HKV, S\] = \[3, 2, 11\], got \[3, 2, 9\]",
    ),
    (
        wrong(seq_lens=torch.ones(3, dtype=torch.int32)),
        r"seq_lens must be \[B, HKV\] = \[3, 2\], got \[3\]",
    ),
    (
        wrong(page_table=torch.ones(3, 3, dtype=torch.int32)),
        r"page_table must be \[B, HKV, MAXP\] = \[3, 2, \?\], got \[3, 3\]",
    ),
    (wrong(positions=torch.ones(3, dtype=torch.int32)), "positions must be int64, got int32"),
    (
        wrong(positions=torch.ones(2, dtype=torch.int64)),
        r"positions must be \[B\] = \[3\], got \[2\]",
    ),
    (wrong(budget=0), r"budget must be in \[1, min\(S, MAXP \* P\)\] = \[1, 11\], got 0"),
    (wrong(budget=12), r"budget must be in \[1, min\(S, MAXP \* P\)\] = \[1, 11\], got 12"),
    (wrong(recent=-1), "recent must be at least 0, got -1"),
    (wrong(n_sink=8), r"n_sink must be in \[0, budget\) = \[0, 8\), got 8"),
    (wrong(k_scale=torch.ones(1, 1, 1)), "k_scale must be None for a cache of float16"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: dict[str, Any], message: str, device: str) -> None:
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in args.items()
    }
    if "stride 1" in message and device == "cuda":
        pytest.skip("a copy to another device is dense")
    with pytest.raises(RuntimeError, match=f"effllm::h2o_append: {message}"):
        h2o_append(**moved)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("positions", (2,), -2, r"positions\[2\] must be -1 or in \[0, 2\^31\), got -2"),
        ("positions", (2,), 2**31, r"positions\[2\] must be -1 or in \[0, 2\^31\), got 2147483648"),
        ("seq_lens", (2, 1), -1, r"seq_lens\[2, 1\] must be in .* = \[0, 11\], got -1"),
        ("seq_lens", (2, 1), 12, r"seq_lens\[2, 1\] must be in .* = \[0, 11\], got 12"),
        ("page_table", (0, 1, 1), -1, r"page_table\[0, 1, 1\] must be in \[0, NP\) = .*, got -1"),
        ("page_table", (0, 1, 1), 99, r"page_table\[0, 1, 1\] must be in \[0, NP\) = .*, got 99"),
    ],
)
def test_values_out_of_range(
    name: str, index: tuple[int, ...], value: int, message: str, device: str
) -> None:
    """Raise on the CPU before anything is written; a GPU leaves out the heads concerned."""
    args = named(CASE, device)
    sane = {key: tensor.clone() for key, tensor in args.items() if isinstance(tensor, Tensor)}
    args[name][index] = value
    before = {key: args[key].clone() for key in WRITTEN}
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"effllm::h2o_append: {message}$"):
            h2o_append(**args)
        for key in WRITTEN:
            assert_equal(args[key], before[key], name=key)
        return
    h2o_append(**args)
    expected = dict(zip(WRITTEN, h2o_append_ref(**(args | sane)), strict=False))
    heads = slice(None) if len(index) == 1 else index[1]
    for key in WRITTEN[2:]:
        expected[key][index[0], heads] = before[key][index[0], heads]
        assert_equal(args[key], expected[key], name=key)


@pytest.mark.gpu
def test_first_call_in_a_cuda_graph_and_replay_until_all_are_full() -> None:
    args = named(H2oAppendCase((3, 6), 8, 2, page_size=8), "cuda")
    start = {name: args[name].clone() for name in WRITTEN}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h2o_append(**args)
    for name in WRITTEN:
        args[name].copy_(start[name])
    for step in range(12):
        args["positions"].fill_(20 + step)
        args["k"].add_(1)
        expected = h2o_append_ref(**args)
        graph.replay()
        for name, wanted in zip(WRITTEN, expected, strict=False):
            assert_equal(args[name], wanted, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["v", "scores", "seq_lens", "positions"])
def test_mixed_devices_are_a_named_error(name: str) -> None:
    args = {
        key: value.cuda() if isinstance(value, Tensor) else value for key, value in wrong().items()
    }
    args[name] = args[name].cpu()
    with pytest.raises(RuntimeError, match=rf"{name} must be on cuda:0 as k is, got cpu"):
        h2o_append(**args)


@pytest.mark.gpu
def test_many_sequences() -> None:
    """More pairs of sequence and head than two of a grid's dimensions may have blocks."""
    case = H2oAppendCase((2,) * 33000, 2, 1, num_kv_heads=2, head_dim=8, page_size=4)
    check_values(h2o_append, case, "cuda")


def test_the_number_of_threads_does_not_matter_on_the_cpu() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            check(named(H2oAppendCase(MIXED * 20, 40, 10, 4), "cpu"))
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """h2o_append as the GPU does it: its own header, on warps whose lanes take turns."""
    library = compiled("h2o_append.cpp", tmp_path_factory.mktemp("h2o_append"))

    def call(
        *args: Tensor,
        budget: int | None = None,
        recent: int,
        n_sink: int = 0,
        normalize: bool = False,
    ) -> None:
        tensors = (*args, *(None,) * (11 - len(args)))
        library.h2o_append_on_warps(
            (TensorArgument * 11)(*map(as_argument, tensors)),
            ctypes.c_int64(args[4].shape[2] if budget is None else budget),
            ctypes.c_int64(recent),
            ctypes.c_int64(n_sink),
            ctypes.c_bool(normalize),
        )

    return call


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_kernel(case: H2oAppendCase, kernel: Callable[..., None]) -> None:
    check_values(kernel, case, "cpu")


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_slots", [3, 1023, 1030, 5000])
def test_the_kernel_finds_the_lowest_wherever_it_lies(
    num_slots: int, offset: int, kernel: Callable[..., None]
) -> None:
    """In each vector of a thread and behind the last one; also where no vector fits."""
    for slot in {0, 1, num_slots // 2, num_slots - 2, num_slots - 1}:
        scores = [2.0] * num_slots
        scores[slot] = 1.0
        args = one_head(scores, list(range(num_slots)))
        args["positions"].fill_(num_slots + 1)
        for name in ("scores", "slot_pos"):
            args[name] = torch.nn.functional.pad(args[name], (offset, 0))[..., offset:]
        kernel(*args.values(), recent=1)
        assert (args["slot_pos"] == num_slots + 1).nonzero()[:, 2].tolist() == [slot]


def test_the_kernel_leaves_out_what_is_out_of_range(kernel: Callable[..., None]) -> None:
    for name, index, value in (
        ("positions", (2,), -2),
        ("positions", (2,), 2**31),
        ("seq_lens", (2, 1), -1),
        ("seq_lens", (2, 1), 12),
        ("page_table", (2, 1, 0), 99),
        ("page_table", (2, 1, 0), -1),
    ):
        args = named(CASE, "cpu")
        sane = {key: value.clone() for key, value in args.items() if isinstance(value, Tensor)}
        if name == "page_table":  # the slot that goes lies in the first page
            for each in (args, sane):
                each["scores"][2, 1, :9] = 5.0
                each["scores"][2, 1, 1] = -1.0
                each["slot_pos"][2, 1, 1] = 3
        args[name][index] = value
        before = {key: args[key].clone() for key in WRITTEN}
        tensors = [value for value in args.values() if isinstance(value, Tensor)]
        kernel(*tensors, budget=8, recent=3, n_sink=2)
        expected = dict(zip(WRITTEN, h2o_append_ref(**(args | sane)), strict=False))
        heads = slice(None) if len(index) == 1 else index[1]
        for key in WRITTEN[2:]:
            expected[key][index[0], heads] = before[key][index[0], heads]
            assert_equal(args[key], expected[key], name=f"{name} {key}")
