"""int4_pack beyond the cases of the contract: the documented formula, slices, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.ops import int4_pack, int4_unpack
from effllm.ops.int4_pack import int4_pack_ref
from effllm.testing import hostile
from effllm.testing.cases.int4_pack import random_codes
from effllm.testing.compare import assert_equal


def test_one_code_lands_where_the_layout_says(device: str) -> None:
    """Each position alone, against the formula of the contract written out."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    for n, k in [(0, 0), (1, 0), (0, 1), (8, 8), (15, 9), (16, 0), (63, 63), (64, 0), (70, 130)]:
        codes = torch.zeros(128, 192, dtype=torch.uint8)
        codes[n, k] = 15
        thread = 32 * ((n % 64) // 16) + 4 * (n % 8) + (k % 8) // 2
        element = 4 * ((k % 16) // 8) + 2 * ((n % 16) // 8) + k % 2
        expected = torch.zeros(2, 3 * 512, dtype=torch.int64)
        expected[n // 64, (k // 64) * 512 + 4 * thread + (k % 64) // 16] = 15 << 4 * order[element]
        assert_equal(int4_pack(codes.to(device)).cpu(), expected.to(torch.int32))


def test_padding_is_code_8(device: str) -> None:
    packed = int4_pack(torch.zeros(1, 1, dtype=torch.uint8, device=device))
    codes = int4_unpack(packed, 64, 64)
    codes[0, 0] = 8
    assert_equal(codes, torch.full_like(codes, 8))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 150), k=st.integers(0, 150), seed=st.integers(0, 2**31))
def test_round_trip(n: int, k: int, seed: int) -> None:
    codes = random_codes(n, k, "cpu", seed)
    packed = int4_pack(codes)
    assert_equal(packed, int4_pack_ref(codes))
    assert_equal(int4_unpack(packed, n, k), codes)


def test_any_strides(device: str) -> None:
    for name, codes in hostile.odd_strides(random_codes(70, 100, device, 0)):
        assert_equal(int4_pack(codes), int4_pack(codes.contiguous()), name=name)


def test_slices_at_multiples_of_64_are_packed_weights(device: str) -> None:
    """What sharding along either dimension relies on."""
    codes = random_codes(192, 256, device, 1)
    packed = int4_pack(codes)
    assert_equal(packed[1:], int4_pack(codes[64:]))
    assert_equal(packed[:, 512 : 3 * 512].contiguous(), int4_pack(codes[:, 64:192]))


def test_code_over_15_is_an_error_on_the_cpu_and_masked_on_the_gpu(device: str) -> None:
    codes = random_codes(20, 30, device, 2)
    codes[7, 11] = 16 + 3
    if device == "cpu":
        with pytest.raises(
            RuntimeError, match=r"int4_pack: codes must be 0\.\.15, got 19 at \[7, 11\]"
        ):
            int4_pack(codes)
    else:
        assert_equal(int4_pack(codes), int4_pack(codes % 16))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(8, 8), r"int4_pack: codes must be uint8, got float32"),
        (torch.zeros(8, 8, dtype=torch.int32), r"int4_pack: codes must be uint8, got int32"),
        (torch.zeros(8, dtype=torch.uint8), r"int4_pack: codes must be \[N, K\] = .*, got \[8\]"),
    ],
)
def test_errors(codes: torch.Tensor, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        int4_pack(codes.to(device))
