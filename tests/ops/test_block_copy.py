"""block_copy beyond the cases of the contract: layouts, bits, what stays untouched, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import block_copy
from effllm.ops.block_copy import block_copy_ref
from effllm.testing import hostile
from effllm.testing.cases.block_copy import BlockCopyCase
from effllm.testing.compare import assert_equal

DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool)


def check(caches: list[Tensor], src: Tensor, dst: Tensor) -> None:
    expected = block_copy_ref(caches, src, dst)
    block_copy(caches, src, dst)
    for index, (cache, wanted) in enumerate(zip(caches, expected, strict=True)):
        assert_equal(cache, wanted, name=f"caches[{index}]")


def numbered(*shape: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=device).to(dtype).view(shape)


def pages(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes_and_memory_orders(data: st.DataObject) -> None:
    num_pages = data.draw(st.integers(1, 9))
    caches = []
    for _ in range(data.draw(st.integers(0, 4))):
        shape = (num_pages, *data.draw(st.lists(st.integers(0, 5), max_size=4)))
        order = data.draw(st.permutations(range(len(shape))))
        inverse = [order.index(axis) for axis in range(len(shape))]
        cache = numbered(*shape, dtype=data.draw(st.sampled_from(DTYPES)))
        caches.append(cache.permute(order).contiguous().permute(inverse))
    shuffled = data.draw(st.permutations(range(num_pages)))
    targets = shuffled[: data.draw(st.integers(0, num_pages - 1))]
    sources = st.sampled_from([*shuffled[len(targets) :], -1])
    src = [data.draw(sources) for _ in targets]
    check(caches, pages(*src), pages(*targets))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_of_a_page_in_memory(order: tuple[int, ...], device: str) -> None:
    inverse = [order.index(axis) for axis in range(4)]
    cache = numbered(6, 3, 4, 8, dtype=torch.float16, device=device)
    check(
        [cache.permute(order).contiguous().permute(inverse)],
        pages(1, 4, device=device),
        pages(5, 0, device=device),
    )


def test_gaps_between_the_elements_of_a_page_stay_as_they_are(device: str) -> None:
    cache = numbered(6, 3, 4, 8, device=device)
    for name, tensor in hostile.odd_strides(cache):
        if name == "expanded":
            continue  # its pages are one
        memory = torch.empty(0, dtype=tensor.dtype, device=device).set_(tensor.untyped_storage())
        before = memory.clone()
        check([tensor], pages(1, 4, device=device), pages(5, 0, device=device))
        inside = torch.zeros_like(memory, dtype=torch.bool)
        inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        assert_equal(memory[~inside], before[~inside], name=name)


def test_latent_caches_that_share_memory(device: str) -> None:
    """MLA: the values are the first columns of the keys."""
    keys = numbered(5, 4, 1, 24, dtype=torch.float32, device=device)
    expected = block_copy_ref([keys], pages(3, device=device), pages(1, device=device))[0]
    block_copy([keys, keys[..., :16]], pages(3, device=device), pages(1, device=device))
    assert_equal(keys, expected)


def test_bits_are_copied_as_they_are(device: str) -> None:
    """NaN payloads, infinities, subnormals and negative zeros included."""
    bits = torch.randint(-(2**15), 2**15, (9, 4, 2, 16), dtype=torch.int16, device=device)
    expected = bits.clone()
    expected[[7, 8]] = bits[[2, 2]]
    block_copy([bits.view(torch.bfloat16)], pages(2, 2, device=device), pages(7, 8, device=device))
    assert_equal(bits, expected)


def test_eight_bit_floats(device: str) -> None:
    bits = torch.arange(256, device=device).to(torch.uint8).view(4, 8, 8)
    expected = bits.clone()
    expected[3] = bits[1]
    block_copy([bits.view(torch.float8_e4m3fn)], pages(1, device=device), pages(3, device=device))
    assert_equal(bits, expected)


def test_entries_that_do_nothing(device: str) -> None:
    cache = numbered(5, 8, device=device)
    before = cache.clone()
    src, dst = pages(-1, 2, 3, -5, device=device), pages(4, -(2**63), 3, -1, device=device)
    block_copy([cache], src, dst)
    assert_equal(cache, before)
    # A page that is copied onto itself may also be read.
    check([cache], pages(3, 3, device=device), pages(3, 0, device=device))
    block_copy([], src, dst)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dim", [5, 64])
def test_nothing_is_written_beside_the_caches(dim: int, device: str) -> None:
    caches, checks = [], []
    for seed in range(3):
        cache, intact = hostile.guarded(hostile.normal(6, 3, dim, device=device, seed=seed))
        caches.append(cache), checks.append(intact)
    check(caches, pages(5, 0, device=device), pages(1, 4, device=device))
    check(caches, pages(1, 4, device=device), pages(5, 0, device=device))
    for intact in checks:
        intact()


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    cache = memory.as_strided((2, 64), (2**31, 1))
    cache[1] = hostile.normal(64, seed=1)
    cache[0] = 0
    block_copy([cache], pages(1, device=device), pages(0, device=device))
    assert_equal(cache[0], cache[1])


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ([0, 5], [1, 2], r"src\[1\] must be negative or in \[0, NP\) = \[0, 5\), got 5"),
        ([0, 1], [3, 2**40], r"dst\[1\] must be negative or in \[0, NP\) = \[0, 5\), got 109951"),
        ([0, 1], [3, 3], r"dst\[1\] must be a page that no other entry writes, got 3"),
        ([0, 1], [3, 0], r"dst\[1\] must be a page that no other entry reads, got 0"),
        ([0, 1], [1, 3], r"dst\[0\] must be a page that no other entry reads, got 1"),
    ],
)
def test_bad_pages_raise_before_anything_is_written(
    src: list[int], dst: list[int], message: str
) -> None:
    cache = numbered(5, 8)
    before = cache.clone()
    with pytest.raises(RuntimeError, match=f"effllm::block_copy: {message}"):
        block_copy([cache], pages(*src), pages(*dst))
    assert_equal(cache, before)


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_pages_out_of_range_are_skipped_on_the_gpu() -> None:
    cache = numbered(5, 8, device="cuda")
    expected = cache.clone()
    expected[2] = cache[0]
    src = pages(0, 5, 1, 2**40, device="cuda")
    block_copy([cache], src, pages(2, 3, 2**40, 4, device="cuda"))
    assert_equal(cache, expected)


@pytest.mark.gpu
def test_first_call_in_a_cuda_graph_and_replay_with_other_pages() -> None:
    (caches, src, dst), _ = BlockCopyCase(5).make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_copy(caches, src, dst)
    src.copy_(pages(3, -1, 4, 3, -1))
    dst.copy_(pages(8, 1, 9, 0, -1))
    expected = block_copy_ref(caches, src, dst)
    graph.replay()
    for cache, wanted in zip(caches, expected, strict=True):
        assert_equal(cache, wanted)


@pytest.mark.gpu
def test_many_copies_of_small_pages() -> None:
    """More copies than the other two dimensions of a grid may have."""
    cache = numbered(2 * 65537, 3, device="cuda")
    src = torch.arange(65537, device="cuda")
    check([cache], src, src + 65537)


ONE = pages(1)
ERRORS: list[tuple[list[Any], str]] = [
    ([[numbered(5, 8)], ONE.int(), ONE], "src must be int64, got int32"),
    ([[numbered(5, 8)], ONE, ONE[None]], r"dst must be \[C\] = \[1\], got \[1, 1\]"),
    ([[numbered(5, 8)], ONE, pages(1, 2)], r"dst must be \[C\] = \[1\], got \[2\]"),
    ([[numbered(5, 8)], pages(1, 2, 3, 4)[::2], pages(1, 2)], "src must have stride 1"),
    ([[torch.tensor(1.0)], ONE, ONE], r"caches\[0\] must have 1 to 5 dimensions, got \[\]"),
    (
        [[numbered(5, 1, 1, 1, 1, 1)], ONE, ONE],
        r"caches\[0\] must have 1 to 5 dimensions, got \[5, 1, 1, 1, 1, 1\]",
    ),
    (
        [[numbered(5, 8), numbered(4, 8)], ONE, ONE],
        r"caches\[1\] must be \[NP, ...\] with NP = 5, got \[4, 8\]",
    ),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: list[Any], message: str, device: str) -> None:
    if device == "cuda":
        caches, *rest = args
        strided = [x if x.stride() == (2,) else x.cuda() for x in rest]
        args = [
            [cache.cuda() for cache in caches],
            *(x if x.is_cuda else x.repeat_interleave(2).cuda()[::2] for x in strided),
        ]
    with pytest.raises(RuntimeError, match=f"effllm::block_copy: {message}"):
        block_copy(*args)


@pytest.mark.gpu
def test_mixed_devices_are_a_named_error() -> None:
    caches = [numbered(5, 8, device="cuda"), numbered(5, 8)]
    one = pages(1, device="cuda")
    with pytest.raises(RuntimeError, match=r"caches\[1\] must be on cuda:0 as src is, got cpu"):
        block_copy(caches, one, one)
