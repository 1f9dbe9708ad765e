"""Sequences that wait in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from filled_cache import HKV, LAYERS, D, contents, feed, make_cache, state

from effllm.cache import OutOfPages, paged
from effllm.cache.swap import from_host, to_host


def test_a_swapped_sequence_leaves_its_pages_to_others_and_comes_back(device: str) -> None:
    cache = make_cache(device, num_pages=4)
    a, b = cache.add(), cache.add()
    feed(cache, a, [float(i) for i in range(9)])
    assert cache.pool.num_free == 0
    cache.swap_out(a)
    assert (cache.is_swapped_out(a), cache.length(a), cache.pages(a)) == (True, 9, ())
    assert cache.pool.num_free == 3
    feed(cache, b, [float(-i) for i in range(12)])
    before = state(cache)
    with pytest.raises(OutOfPages, match="needed 3 pages, found 0 free"):
        cache.swap_in(a)
    assert (state(cache), cache.is_swapped_out(a)) == (before, True)
    cache.free(b)
    cache.swap_in(a)
    cache.swap_in(a)
    assert not cache.is_swapped_out(a)
    for layer in range(LAYERS):
        assert contents(cache, a, layer) == list(range(9))
    feed(cache, a, [9.0])
    assert contents(cache, a) == list(range(10))


def test_swapping_shared_and_committed_pages_harms_nobody() -> None:
    cache = make_cache()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    a = cache.add(prompt)
    feed(cache, a, [float(t) for t in prompt])
    cache.commit(a, prompt)
    b = cache.fork(a)
    cache.swap_out(a)
    cache.swap_out(a)
    assert cache.length(cache.add([1, 2, 3, 4, 5])) == 4
    feed(cache, b, [10.0])
    cache.swap_in(a)
    assert not set(cache.pages(a)) & set(cache.pages(b))
    cache.commit(a, prompt)
    feed(cache, a, [11.0])
    assert contents(cache, b) == [*prompt, 10]
    assert contents(cache, a) == [*prompt, 11]


def test_only_the_content_is_swapped_and_a_free_drops_it() -> None:
    cache = make_cache(num_pages=6)
    a = cache.add()
    cache.reserve(a, 20)
    cache.swap_out(a)  # nothing but reserved pages
    assert (cache.is_swapped_out(a), cache.pool.num_free) == (False, 5)
    feed(cache, a, [1.0, 2.0])
    cache.reserve(a, 18)
    cache.swap_out(a)
    assert [tuple(rows.shape) for rows in cache._seqs[a].host] == [(1, 4, HKV, D)] * 2 * LAYERS
    assert cache.pool.num_free == 5
    cache.free(a)
    with pytest.raises(IndexError, match=f"no sequence {a}"):
        cache.swap_in(a)


def test_a_swapped_sequence_refuses_everything_else() -> None:
    cache = make_cache()
    a, b = cache.add(), cache.add()
    cache.step([(a, 3), (b, 3)])
    cache.swap_out(a)
    before = state(cache)
    for call in (
        lambda: cache.step([(b, 1), (a, 1)]),
        lambda: cache.reserve(a, 1),
        lambda: cache.fork(a),
        lambda: cache.reorder([b, a], [0, 1]),
        lambda: cache.crop(a, 1),
        lambda: cache.commit(a, [1, 2, 3]),
    ):
        with pytest.raises(ValueError, match=f"sequence {a} is swapped out: swap_in comes first"):
            call()
    assert state(cache) == before


@pytest.mark.parametrize("failing", ["to_host", "from_host"])
def test_a_swap_that_runs_out_of_memory_changes_nothing(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    a = cache.add()
    feed(cache, a, [1.0, 2.0, 3.0, 4.0, 5.0])
    if failing == "from_host":
        cache.swap_out(a)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    before = state(cache)
    with monkeypatch.context() as patch:
        patch.setattr(paged, failing, fail)
        with pytest.raises(torch.OutOfMemoryError):
            (cache.swap_out if failing == "to_host" else cache.swap_in)(a)
    assert state(cache) == before
    assert cache.is_swapped_out(a) == (failing == "from_host")
    cache.swap_out(a)
    cache.swap_in(a)
    assert contents(cache, a) == [1, 2, 3, 4, 5]


@pytest.mark.gpu
def test_host_memory_of_a_gpu_cache_is_pinned() -> None:
    cache = make_cache("cuda")
    a = cache.add()
    feed(cache, a, [1.0, 2.0])
    cache.swap_out(a)
    assert all(rows.is_pinned() for rows in cache._seqs[a].host)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_swapped_bits_are_the_same(dtype: torch.dtype, device: str) -> None:
    """NaN payloads too, in any memory order."""
    bytes_ = torch.randint(0, 256, (6, 2, 4, 8 * dtype.itemsize), dtype=torch.uint8, device=device)
    expected = bytes_.clone()
    cache = bytes_.view(dtype).transpose(1, 2)
    host = to_host([cache], [4, 1])
    assert host[0].device.type == "cpu"
    from_host(host, [cache], [0, 5])
    expected[[0, 5]] = bytes_[[4, 1]]
    assert torch.equal(bytes_, expected)
