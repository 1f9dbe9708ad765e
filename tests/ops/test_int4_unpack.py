"""int4_unpack beyond the cases of the contract: strided rows, errors."""

from __future__ import annotations

import pytest
import torch

from effllm.ops import int4_pack, int4_unpack
from effllm.testing.cases.int4_pack import random_codes
from effllm.testing.compare import assert_equal


def test_rows_may_be_strided(device: str) -> None:
    codes = random_codes(130, 256, device, 0)
    columns = int4_pack(codes)[:, 512:1536]
    assert not columns.is_contiguous()
    assert_equal(int4_unpack(columns, 130, 128), codes[:, 64:192].contiguous())


@pytest.mark.parametrize(
    ("qweight", "n", "k", "message"),
    [
        (torch.zeros(1, 512), 64, 64, r"qweight must be int32, got float32"),
        (
            torch.zeros(1, 512, dtype=torch.int32),
            65,
            64,
            r"qweight must be \[ceil\(n/64\), ceil\(k/64\)\*512\] = \[2, 512\], got \[1, 512\]",
        ),
        (torch.zeros(512, dtype=torch.int32), 64, 64, r"qweight must be .* got \[512\]"),
        (torch.zeros(1, 512, dtype=torch.int32), -1, 64, r"n and k must be at least 0, got n = -1"),
        (
            torch.zeros(512, 2, dtype=torch.int32).T,
            128,
            64,
            r"qweight must have stride 1 in its last dimension, got strides \[1, 2\]",
        ),
    ],
)
def test_errors(qweight: torch.Tensor, n: int, k: int, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=f"int4_unpack: {message}"):
        int4_unpack(qweight.to(device), n, k)
