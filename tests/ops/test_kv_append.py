"""kv_append beyond the cases of the contract: layouts, bits, what stays untouched, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import kv_append
from effllm.ops.kv_append import kv_append_ref
from effllm.testing import hostile
from effllm.testing.cases.kv_append import KvAppendCase
from effllm.testing.compare import assert_equal

CASE = KvAppendCase(7, 2, 64, 4, torch.float16)


def check(args: tuple[Tensor, ...]) -> None:
    expected = kv_append_ref(*args)
    kv_append(*args)
    assert_equal(args[2], expected[0], name="k_cache")
    assert_equal(args[3], expected[1], name="v_cache")


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    dim=st.integers(1, 40),
    page_size=st.integers(1, 20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    skip_every=st.sampled_from([None, 1, 2, 3]),
    packed=st.booleans(),
)
def test_any_shape(
    num_tokens: int,
    heads: int,
    dim: int,
    page_size: int,
    dtype: torch.dtype,
    skip_every: int | None,
    packed: bool,
) -> None:
    case = KvAppendCase(num_tokens, heads, dim, page_size, dtype, skip_every, packed)
    check(case.make("cpu")[0])


@pytest.mark.parametrize("index", range(5), ids=["k", "v", "k_cache", "v_cache", "slot_mapping"])
def test_any_strides(index: int, device: str) -> None:
    args, _ = CASE.make(device)
    for name, tensor in hostile.odd_strides(args[index]):
        written_twice = index in (2, 3, 4) and name == "expanded"
        if written_twice or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            continue
        fresh = list(CASE.make(device)[0])
        fresh[index] = tensor
        check(tuple(fresh))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)])
def test_any_order_of_the_cache_in_memory(order: tuple[int, ...], device: str) -> None:
    k, v, k_cache, v_cache, slots = CASE.make(device)[0]
    inverse = [order.index(axis) for axis in range(4)]
    k_cache, v_cache = (
        cache.permute(order).contiguous().permute(inverse) for cache in (k_cache, v_cache)
    )
    check((k, v, k_cache, v_cache, slots))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bits_are_copied_as_they_are(dtype: torch.dtype, device: str) -> None:
    """NaN payloads, infinities, subnormals and negative zeros included."""
    case = KvAppendCase(50, 2, 64, 16, dtype, skip_every=None)
    k, v, k_cache, v_cache, slots = case.make(device)[0]
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    limits = torch.iinfo(bits)
    k, v = (
        torch.randint(limits.min, limits.max, k.shape, dtype=bits, device=device) for _ in range(2)
    )
    kv_append(k.view(dtype), v.view(dtype), k_cache, v_cache, slots)
    pages, offsets = slots // 16, slots % 16
    assert_equal(k_cache.view(bits)[pages, offsets], k)
    assert_equal(v_cache.view(bits)[pages, offsets], v)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dim", [5, 64])
def test_nothing_is_written_beside_the_cache(dim: int, device: str) -> None:
    k, v, k_cache, v_cache, _ = KvAppendCase(4, 2, dim, 4).make(device)[0]
    k_cache, check_k = hostile.guarded(k_cache)
    v_cache, check_v = hostile.guarded(v_cache)
    last = k_cache.shape[0] * k_cache.shape[1] - 1
    check((k, v, k_cache, v_cache, torch.tensor([0, last, -1, 1], device=device)))
    check_k(), check_v()


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    k_cache, v_cache = (
        memory.as_strided((2, 1, 1, 32), (2**31, 32, 32, 1), offset) for offset in (0, 32)
    )
    k, v = (hostile.normal(1, 1, 32, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1))
    kv_append(k, v, k_cache, v_cache, torch.tensor([1], device=device))
    assert_equal(k_cache[1, 0], k[0])
    assert_equal(v_cache[1, 0], v[0])


@pytest.mark.parametrize("slot", [-2, 24, 2**40, -(2**63)])
def test_slots_out_of_range_raise_before_anything_is_written(slot: int) -> None:
    k, v, *_ = CASE.make("cpu")[0]
    slots = torch.arange(7)
    slots[5] = slot
    caches = [hostile.poison_(torch.empty(6, 4, 2, 64, dtype=CASE.dtype)) for _ in range(2)]
    message = rf"slot_mapping\[5\] must be -1 or in \[0, NP \* P\) = \[0, 24\), got {slot}$"
    with pytest.raises(RuntimeError, match=f"effllm::kv_append: {message}"):
        kv_append(k, v, caches[0], caches[1], slots)
    assert all(cache.isnan().all() for cache in caches)


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_slots_out_of_range_are_skipped_on_the_gpu() -> None:
    k, v, k_cache, v_cache, slots = CASE.make("cuda")[0]
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    wild = slots.clone()
    wild[1], wild[2], wild[3] = num_slots, -2, 2**40
    sane = wild.masked_fill((wild < 0) | (wild >= num_slots), -1)
    expected = kv_append_ref(k, v, k_cache, v_cache, sane)
    kv_append(k, v, k_cache, v_cache, wild)
    assert_equal(k_cache, expected[0])
    assert_equal(v_cache, expected[1])


@pytest.mark.gpu
def test_first_call_in_a_cuda_graph_and_replay_with_other_slots() -> None:
    k, v, k_cache, v_cache, slots = CASE.make("cuda")[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_append(k, v, k_cache, v_cache, slots)
    slots.copy_(torch.arange(7).flip(0))
    k.copy_(k + 1)
    expected = kv_append_ref(k, v, k_cache, v_cache, slots)
    graph.replay()
    assert_equal(k_cache, expected[0])
    assert_equal(v_cache, expected[1])


def wrong(**changes: Any) -> dict[str, Any]:
    names = ("k", "v", "k_cache", "v_cache", "slot_mapping")
    return dict(zip(names, CASE.make("cpu")[0], strict=True)) | changes


HALF = torch.float16
ERRORS = [
    (
        wrong(k=torch.ones(7, 2, 64, dtype=torch.int32)),
        "k must be float16, bfloat16 or float32, got int32",
    ),
    (wrong(k=torch.ones(7, 128, dtype=HALF)), r"k must be \[T, HKV, D\] = .*, got \[7, 128\]"),
    (
        wrong(k=torch.ones(7, 64, 2, dtype=HALF).transpose(1, 2)),
        r"k must have stride 1 in its last dimension, got strides \[128, 1, 2\]",
    ),
    (wrong(v=torch.ones(7, 2, 64)), "v must be float16, got float32"),
    (
        wrong(v=torch.ones(7, 2, 32, dtype=HALF)),
        r"v must be \[T, HKV, D\] = \[7, 2, 64\], got \[7, 2, 32\]",
    ),
    (
        wrong(v=torch.ones(7, 2, 128, dtype=HALF)[..., ::2]),
        r"v must have stride 1 in its last dimension, got strides \[256, 128, 2\]",
    ),
    (
        wrong(k_cache=torch.ones(4, 4, 2, 64, dtype=torch.bfloat16)),
        "k_cache must be float16, float8_e4m3fn, int8 or uint8, got bfloat16",
    ),
    (
        wrong(k_cache=torch.ones(4, 4, 3, 64, dtype=HALF)),
        r"k_cache must be \[NP, P, HKV, D\] = \[4, 4, 2, 64\], got \[4, 4, 3, 64\]",
    ),
    (
        wrong(k_cache=torch.ones(16, 2, 64, dtype=HALF)),
        r"k_cache must be \[NP, P, HKV, D\] = .*, got \[16, 2, 64\]",
    ),
    (
        wrong(k_cache=torch.ones(4, 4, 64, 2, dtype=HALF).transpose(2, 3)),
        "k_cache must have stride 1 in its last dimension",
    ),
    (wrong(v_cache=torch.ones(4, 4, 2, 64)), "v_cache must be float16, got float32"),
    (
        wrong(v_cache=torch.ones(5, 4, 2, 64, dtype=HALF)),
        r"v_cache must be \[NP, P, HKV, D\] = \[4, 4, 2, 64\], got \[5, 4, 2, 64\]",
    ),
    (
        wrong(v_cache=torch.ones(4, 4, 64, 2, dtype=HALF).transpose(2, 3)),
        "v_cache must have stride 1 in its last dimension",
    ),
    (
        wrong(slot_mapping=torch.ones(7, dtype=torch.int32)),
        "slot_mapping must be int64, got int32",
    ),
    (
        wrong(slot_mapping=torch.ones(8, dtype=torch.int64)),
        r"slot_mapping must be \[T\] = \[7\], got \[8\]",
    ),
    (
        wrong(slot_mapping=torch.ones(7, 1, dtype=torch.int64)),
        r"slot_mapping must be \[T\] = \[7\], got \[7, 1\]",
    ),
    (
        wrong(slot_mapping=torch.ones(14, dtype=torch.int64)[::2]),
        r"slot_mapping must have stride 1 in its last dimension, got strides \[2\]",
    ),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: dict[str, Tensor], message: str, device: str) -> None:
    moved = {name: to_device(tensor, device) for name, tensor in args.items()}
    with pytest.raises(RuntimeError, match=f"effllm::kv_append: {message}"):
        kv_append(**moved)


def to_device(tensor: Tensor, device: str) -> Tensor:
    """With the strides that it has, which `.to` does not promise."""
    if device == "cpu":
        return tensor
    result = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return result.copy_(tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v", "k_cache", "v_cache", "slot_mapping"])
def test_mixed_devices_are_a_named_error(name: str) -> None:
    args = {key: tensor.cuda() for key, tensor in wrong().items()}
    args[name] = args[name].cpu()
    with pytest.raises(RuntimeError, match=r"must be on (cpu|cuda:0) as k is, got (cpu|cuda:0)"):
        kv_append(**args)
