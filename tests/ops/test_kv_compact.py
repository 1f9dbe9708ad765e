"""kv_compact beyond the cases of the contract: paths, layouts, bits, what stays, errors; and its
kernel, proved without a GPU, on lanes that take turns."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm._host import TokenTree
from effllm.ops import kv_compact, tree_verify
from effllm.ops.kv_compact import kv_compact_ref
from effllm.testing import hostile
from effllm.testing.cases.kv_compact import CASES, KvCompactCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import check_values

Compact = Callable[..., None]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Compact:
    """kv_compact as the GPU does it."""
    library = compiled("kv_compact.cpp", tmp_path_factory.mktemp("kv_compact"))

    def call(caches: Sequence[Tensor], *others: Tensor) -> None:
        tensors = (TensorArgument * (len(caches) + 4))(*map(as_argument, [*caches, *others]))
        assert library.kv_compact(tensors, ctypes.c_int64(len(caches))) == 0

    return call


def check(compact: Compact, caches: list[Tensor], *others: Tensor) -> None:
    expected = kv_compact_ref(caches, *others)
    compact(caches, *others)
    for index, (cache, wanted) in enumerate(zip(caches, expected, strict=True)):
        assert_equal(cache, wanted, name=f"caches[{index}]")


ANY_CASE = st.builds(
    KvCompactCase,
    num_trees=st.integers(0, 4),
    num_nodes=st.integers(1, 20),
    num_layers=st.integers(1, 2),
    num_kv_heads=st.integers(1, 3),
    page_size=st.integers(1, 7),
    head_dim=st.sampled_from([1, 3, 8, 12, 16]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.uint8]),
    per_head=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(case=ANY_CASE, seed=st.integers(0, 100))
def test_any_shape(case: KvCompactCase, seed: int) -> None:
    (caches, *others), _ = case.make("cpu", seed)
    check(kv_compact, caches, *others)


@pytest.mark.parametrize("case", [c for c in CASES if c.num_layers <= 3], ids=lambda case: case.id)
def test_kernel_moves_what_the_reference_moves(case: KvCompactCase, kernel: Compact) -> None:
    check_values(kernel, case, "cpu")


@settings(max_examples=30, deadline=None)
@given(case=ANY_CASE, seed=st.integers(0, 100))
def test_kernel_of_any_shape(case: KvCompactCase, seed: int, kernel: Compact) -> None:
    (caches, *others), _ = case.make("cpu", seed)
    check(kernel, caches, *others)


def int32(values: Any, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_overlapping_moves_go_in_order(device: str) -> None:
    """A place that a row has left takes another: every node but the root moves by one."""
    length = 50
    cache = torch.arange(64, dtype=torch.float32, device=device).view(64, 1, 1, 1).clone()
    path = int32([[0, *range(2, length + 1)]], device)
    kv_compact(
        [cache],
        torch.arange(64, dtype=torch.int32, device=device)[None],
        int32([5], device),
        path,
        int32([length], device),
    )
    numbers = [*range(6), *range(7, 6 + length), *range(5 + length, 64)]
    assert cache.flatten().tolist() == numbers


def test_path_of_a_verified_tree(device: str) -> None:
    """Each row holds the token of its position: the accepted path's tokens come to follow the
    text, for every KV head from where its own text ends."""
    tree = TokenTree([7, 1, 2, 3, 4, 5], [-1, 0, 0, 2, 2, 4])
    logits = torch.zeros(6, 9)
    for node, token in ((0, 2), (2, 4), (4, 8)):
        logits[node, token] = 1.0
    accept_index, num_accepted, next_token = tree_verify(
        logits.to(device),
        torch.tensor(tree.tokens, device=device),
        int32(tree.first_child, device),
        int32(tree.next_sibling, device),
        int32([0, 6], device),
        *(torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)),
        torch.ones(1, device=device),
        *(torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)),
        max_nodes=6,
    )
    assert (accept_index[0, :3].tolist(), next_token.item()) == ([0, 2, 4], 8)
    page_table = int32([[[1, 2, 3, 4], [8, 7, 6, 5]]], device)
    prefix_lens = int32([[2, 5]], device)
    cache = torch.full((9, 4, 2, 1), -1.0, device=device)
    for head, prefix in enumerate((2, 5)):
        for node, token in enumerate(tree.tokens):
            position = prefix + node
            cache[page_table[0, head, position // 4], position % 4, head] = token
    before = cache.clone()
    kv_compact([cache], page_table, prefix_lens, accept_index, num_accepted)
    for head, prefix in enumerate((2, 5)):
        flat = cache[page_table[0, head].long(), :, head].flatten().tolist()
        old = before[page_table[0, head].long(), :, head].flatten().tolist()
        assert flat[prefix : prefix + 3] == [7, 2, 4]
        assert flat[:prefix] == old[:prefix]
        assert flat[prefix + 3 :] == old[prefix + 3 :]


@pytest.mark.parametrize("per_head", [False, True])
def test_every_kind_of_strides(per_head: bool, device: str) -> None:
    """Gaps keep their bits; tables, lengths and paths may be slices."""
    case = KvCompactCase(4, 9, 1, 2, 3, 8, per_head=per_head)
    (caches, *others), _ = case.make(device)
    expected = kv_compact_ref(caches, *others)[0]
    for name, cache in hostile.odd_strides(caches[0]):
        if cache.stride(-1) != 1 or name == "expanded":
            continue
        memory = torch.empty(0, dtype=cache.dtype, device=device).set_(cache.untyped_storage())
        before = memory.clone()
        kv_compact([cache], *others)
        assert_equal(cache, expected, name=name)
        inside = torch.zeros_like(memory, dtype=torch.bool)
        inside.as_strided(cache.shape, cache.stride(), cache.storage_offset()).fill_(True)
        assert_equal(memory[~inside].view(torch.int16), before[~inside].view(torch.int16))
    for index in range(3):
        for name, tensor in hostile.odd_strides(others[index]):
            if (tensor.dim() > 1 and tensor.stride(-1) != 1) or name == "expanded":
                continue
            if tensor.dim() == 1 and tensor.stride(0) != 1:
                continue
            cache = caches[0].clone()
            given = [*others[:index], tensor, *others[index + 1 :]]
            kv_compact([cache], *given)
            assert_equal(cache, expected, name=f"argument {index} {name}")


@pytest.mark.sanitizer
@pytest.mark.parametrize("dim", [5, 64])
def test_nothing_is_written_beside_the_caches(dim: int, device: str) -> None:
    (caches, *others), _ = KvCompactCase(4, 9, 2, 2, 3, dim).make(device)
    copies, checks = zip(*(hostile.guarded(cache) for cache in caches), strict=True)
    check(kv_compact, list(copies), *others)
    for intact in checks:
        intact()


def test_bits_are_moved_as_they_are(device: str) -> None:
    """NaN payloads, infinities, subnormals and negative zeros included."""
    (caches, *others), _ = KvCompactCase(5, 9, 1, 2, 4, 64).make(device)
    for cache in caches:
        cache.view(torch.int16).random_(-(2**15), 2**15)
    expected = [x.view(torch.int16) for x in kv_compact_ref(caches, *others)]
    kv_compact(caches, *others)
    for cache, wanted in zip(caches, expected, strict=True):
        assert_equal(cache.view(torch.int16), wanted)


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    cache = memory.as_strided((2, 2, 1, 32), (2**31, 32, 32, 1))
    cache[1] = hostile.normal(2, 1, 32, seed=1)
    cache[0] = 0
    given = (int32([[0, 1]], device), int32([0], device), int32([[0, 3]], device))
    kv_compact([cache], *given, int32([2], device))
    assert_equal(cache[0, 1], cache[1, 1])
    assert cache[0, 0].eq(0).all()


def wild() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Six trees of three nodes, all of which go wrong but the first and the last: a cache, what
    a kernel is given, and the same without what goes wrong."""
    cache = torch.arange(48.0).view(24, 2, 1, 1)
    page_table = torch.arange(24, dtype=torch.int32).view(6, 4)
    prefix_lens = int32([1, -1, 2**31 - 1, 1, 3, 1])
    accept_index = int32([[0, 2, 3]] * 6)
    num_accepted = int32([3, 3, 3, 99, -5, 3])
    page_table[3, 2] = 24  # of the last node, at position 4
    sane = [x.clone() for x in (page_table, prefix_lens, accept_index, num_accepted)]
    sane[1][1:3] = 0
    sane[3][:] = int32([3, 0, 0, 2, 0, 3])
    return [cache], [page_table, prefix_lens, accept_index, num_accepted], sane


def test_kernel_leaves_out_what_is_out_of_range(kernel: Compact) -> None:
    caches, given, sane = wild()
    expected = kv_compact_ref(caches, *sane)
    kernel(caches, *given)
    assert_equal(caches[0], expected[0])


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_what_is_out_of_range_is_left_out_on_the_gpu() -> None:
    caches, given, sane = wild()
    expected = kv_compact_ref(caches, *sane)
    cuda = [cache.cuda() for cache in caches]
    kv_compact(cuda, *(x.cuda() for x in given))
    assert_equal(cuda[0].cpu(), expected[0])


@pytest.mark.gpu
def test_first_call_in_a_cuda_graph_and_replay_with_other_paths() -> None:
    case = KvCompactCase(5, 9)
    (caches, *others), _ = case.make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_compact(caches, *others)
    (_, *changed), _ = case.make("cuda", seed=1)
    for tensor, values in zip(others, changed, strict=True):
        tensor.copy_(values)
    expected = kv_compact_ref(caches, *others)
    graph.replay()
    for cache, wanted in zip(caches, expected, strict=True):
        assert_equal(cache, wanted)


def arguments() -> dict[str, Any]:
    """Two trees of four nodes behind three and one tokens, in pages of two."""
    return {
        "caches": [torch.zeros(9, 2, 3, 8), torch.zeros(9, 2, 3)],
        "page_table": int32([[1, 2, 3, 4], [5, 6, 7, 99]]),
        "prefix_lens": int32([3, 1]),
        "accept_index": int32([[0, 2, 3, -1], [0, 1, 4, -1]]),
        "num_accepted": int32([3, 3]),
    }


SHAPES = [
    ("page_table", torch.zeros(2, 4), "page_table must be int32, got float32"),
    ("page_table", int32([1]), r"page_table must be \[B, MAXP\] = \[\?, \?\], got \[1\]"),
    ("prefix_lens", int32([[3], [1]]), r"prefix_lens must be \[B\] = \[2\], got \[2, 1\]"),
    ("prefix_lens", torch.zeros(2).long(), "prefix_lens must be int32, got int64"),
    ("page_table", int32([[[1]] * 2] * 2), r"prefix_lens must be \[B, HKV\] = \[2, 2\], got \[2\]"),
    ("accept_index", int32([[0, 1]]), r"accept_index must be \[B, W\] = \[2, \?\], got \[1, 2\]"),
    ("num_accepted", int32([1]), r"num_accepted must be \[B\] = \[2\], got \[1\]"),
    ("caches", [torch.zeros(9, 2)], r"caches\[0\] must be \[NP, P, HKV, D\] = .*, got \[9, 2\]"),
    (
        "caches",
        [torch.zeros(9, 2, 3, 8), torch.zeros(9, 2, 4)],
        r"caches\[1\] must be \[NP, P, HKV\] = \[9, 2, 3\], got \[9, 2, 4\]",
    ),
    ("caches", [torch.zeros(9, 2, 8, 3).mT], r"caches\[0\] must have stride 1"),
    ("caches", [torch.zeros(9, 0, 3)], r"caches\[0\] must have a page size of 1 to 2\^31 - 1"),
]


@pytest.mark.parametrize(("name", "value", "message"), SHAPES)
def test_errors(name: str, value: Any, message: str, device: str) -> None:
    given = arguments() | {name: value}
    moved = {
        key: [x.to(device) for x in value] if key == "caches" else value.to(device)
        for key, value in given.items()
    }
    with pytest.raises(RuntimeError, match=f"effllm::kv_compact: {message}"):
        kv_compact(**moved)


VALUES = [
    ("num_accepted", 1, 5, r"num_accepted\[1\] must be in \[0, W\] = \[0, 4\], got 5"),
    ("num_accepted", 0, -1, r"num_accepted\[0\] must be in \[0, W\] = \[0, 4\], got -1"),
    ("accept_index", (0, 0), -1, r"accept_index\[0, 0\] must be at least 0, .*, got -1"),
    ("accept_index", (1, 2), 1, r"accept_index\[1, 2\] must be at least 2, .*, got 1"),
    ("prefix_lens", 1, -2, r"give node 4 of tree 1 a position in \[0, MAXP \* P\) = \[0, 8\).* 2"),
    ("prefix_lens", 0, 5, r"give node 3 of tree 0 .* and a page in \[0, NP\) = \[0, 9\), .* 8"),
    ("page_table", (0, 2), 9, r"give node 2 of tree 0 .* position 5"),
    ("page_table", (1, 1), -1, r"give node 2 of tree 1 .* position 3"),
]


@pytest.mark.parametrize(("name", "index", "value", "message"), VALUES)
def test_bad_paths_raise_before_anything_is_written(
    name: str, index: Any, value: int, message: str
) -> None:
    given = arguments()
    kv_compact(**given)
    for cache in given["caches"]:
        cache.copy_(torch.arange(cache.numel()).view(cache.shape))
    before = [cache.clone() for cache in given["caches"]]
    given[name][index] = value
    with pytest.raises(RuntimeError, match=f"effllm::kv_compact: .*{message}"):
        kv_compact(**given)
    for cache, wanted in zip(given["caches"], before, strict=True):
        assert_equal(cache, wanted)


@pytest.mark.gpu
def test_mixed_devices_are_a_named_error() -> None:
    (caches, *others), _ = KvCompactCase(2, 4).make("cuda")
    with pytest.raises(RuntimeError, match=r"caches\[1\] must be on cuda:0 as page_table is, got"):
        kv_compact([caches[0], caches[1].cpu()], *others)
