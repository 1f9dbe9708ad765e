"""Hostile data is as hostile as it says."""

from __future__ import annotations

import pytest
import torch

from effllm.testing import hostile


def test_normal_data_is_off_centre_and_has_outliers() -> None:
    values = hostile.normal(400, 100, seed=3)
    assert values.median().item() == pytest.approx(0.5, abs=0.05)
    assert 10 < (values.abs() > 10).sum() < 200
    assert torch.equal(values, hostile.normal(400, 100, seed=3))
    assert not torch.equal(values, hostile.normal(400, 100, seed=4))
    assert hostile.normal(2, 3, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_poison_is_nan_for_floats(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 3).to(dtype)
    mask = torch.tensor([True, False, False, True])[:, None]
    assert hostile.poison_(tensor, mask).float().isnan().all(1).tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert hostile.poison_(tensor).float().isnan().all()


def test_poison_is_the_largest_value_for_integers() -> None:
    assert hostile.poison_(torch.zeros(2, dtype=torch.uint8)).tolist() == [255, 255]
    assert hostile.poison_(torch.zeros(1, dtype=torch.int32)).item() == 2**31 - 1
    assert hostile.poison_(torch.zeros(1, dtype=torch.bool)).item() is True


def test_unused_slots_are_poisoned_and_used_ones_kept() -> None:
    cache = torch.ones(5, 4, 2, 8)
    page_table = torch.tensor([[3, 1, -1], [2, 2147480000, 7]], dtype=torch.int32)
    seq_lens = torch.tensor([6, 4], dtype=torch.int32)
    hostile.poison_unused_slots_(cache, page_table, seq_lens)
    live = (~cache.isnan()).all(-1).all(-1)
    expected = torch.zeros(5, 4, dtype=torch.bool)
    expected[3] = expected[2] = True
    expected[1, :2] = True
    assert torch.equal(live, expected)


def test_table_tails_are_absurd_and_heads_kept() -> None:
    page_table = torch.arange(8, dtype=torch.int32).view(2, 4)
    seq_lens = torch.tensor([5, 0], dtype=torch.int32)
    tails = hostile.absurd_tails(page_table, seq_lens, page_size=4)
    assert tails.dtype == torch.int32
    assert tails.tolist() == [[0, 1, 2147480000, -1], [2147480000, -1, 2147480000, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_odd_strides_hold_the_same_values(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    variants = dict(hostile.odd_strides(tensor))
    assert set(variants) == {"every_other_0", "every_other_1", "offset", "transposed", "expanded"}
    for name, variant in variants.items():
        assert variant.stride() != tensor.stride()
        wanted = tensor[:1].expand_as(tensor) if name == "expanded" else tensor
        assert torch.equal(variant, wanted), name
    # The kernel that takes the pointer for dense must not find the next value where it looks.
    dense = torch.as_strided(variants["every_other_1"], (4, 6), (6, 1))
    assert dense.isnan().any() if dtype.is_floating_point else (dense == 255).any()
    assert variants["offset"].data_ptr() % 16 != 0


def test_odd_strides_of_vectors_and_empty_tensors() -> None:
    assert [name for name, _ in hostile.odd_strides(torch.ones(3))] == ["every_other_0", "offset"]
    assert all(variant.shape == (0, 4) for _, variant in hostile.odd_strides(torch.ones(0, 4)))


@pytest.mark.parametrize(
    ("offset", "message"), [(-1, "before .* byte -1"), (24, "after .* byte 24")]
)
def test_guard_bands_notice_one_byte(device: str, offset: int, message: str) -> None:
    tensor = torch.arange(6, dtype=torch.float32, device=device).view(2, 3)
    inner, check = hostile.guarded(tensor)
    assert torch.equal(inner, tensor)
    assert inner.is_contiguous()
    assert inner.data_ptr() % 16 == 0
    inner.fill_(7)
    check()
    memory = torch.as_strided(inner, (1,), (1,), 0).view(torch.uint8)
    start = inner.storage_offset() * inner.element_size()
    torch.as_strided(memory, (1,), (1,), start + offset).fill_(0)
    with pytest.raises(AssertionError, match=message):
        check()


def test_allocations_are_nan_within_the_context(device: str) -> None:
    like = torch.zeros(1, device=device)
    with hostile.nan_allocations():
        assert torch.empty(50, 3, device=device).isnan().all()
        assert like.new_empty(50, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(like).isnan().all()
        assert (like.new_empty(50, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_context_restores_the_mode_it_found() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with hostile.nan_allocations():
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
