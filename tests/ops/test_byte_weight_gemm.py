"""What the matmuls over weights of a byte each have in common on the CPU: no result depends on what
is computed beside it, and numbers at the ends of their ranges go where they belong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from effllm.ops import fp8_weight_gemm, int8_weight_gemm
from effllm.testing.cases.fp8_weight_gemm import Fp8WeightGemmCase
from effllm.testing.cases.int8_weight_gemm import Int8WeightGemmCase
from effllm.testing.compare import assert_equal

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Variant:
    """An op and its cases; ``grouped`` is what these call scales of 128 columns."""

    call: Callable[..., Tensor]
    case: type[Fp8WeightGemmCase]
    grouped: str

    def per(self, per: str) -> str:
        return self.grouped if per == "grouped" else per


VARIANTS = [
    Variant(fp8_weight_gemm, Fp8WeightGemmCase, "block"),
    Variant(int8_weight_gemm, Int8WeightGemmCase, "group"),
]
each_op = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.call.__name__)


@each_op
@pytest.mark.parametrize("dtype", [BF16, HALF, FP32])
@pytest.mark.parametrize("per", ["row", "grouped"])
def test_a_token_does_not_depend_on_its_batch(op: Variant, per: str, dtype: torch.dtype) -> None:
    """The same bits alone, beside few tokens and in any position of many."""
    (x, *weights), _ = op.case(300, 72, 1000, op.per(per), dtype, bias=True).make("cpu")
    whole = op.call(x, *weights)
    for size in (1, 2, 3, 5, 9, 16, 17, 33, 64, 256, 270):
        for first in (0, 300 - size):
            part = slice(first, first + size)
            assert_equal(op.call(x[part], *weights), whole[part], name=f"{part}")


@each_op
@pytest.mark.parametrize("per", ["tensor", "row", "grouped"])
def test_rows_do_not_depend_on_each_other(op: Variant, per: str) -> None:
    """The same bits of the first rows of W alone, wherever blocks of them end."""
    case = op.case(40, 1000, 392, op.per(per), BF16, bias=True)
    (x, weight, w_scales, bias), _ = case.make("cpu")
    whole = op.call(x, weight, w_scales, bias)
    for n in (1, 15, 17, 33, 128, 129, 255, 999):
        rows = {"tensor": 1, "row": n, "group": n, "block": -(-n // 128)}[case.per]
        found = op.call(x, weight[:n], w_scales[:rows], bias[:n])
        assert_equal(found, whole[:, :n], name=f"{n} rows")


@each_op
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_scales_and_biases_that_are_no_numbers(op: Variant, m: int, value: float) -> None:
    """They reach the outputs that they are for; infinity times a sum of zero is NaN."""
    (x, weight, w_scales, bias), _ = op.case(m, 300, 392, "row", BF16, bias=True).make("cpu")
    expected = op.call(x, weight, w_scales, bias)
    sums = op.call(x, weight[7:8], torch.ones(1))[:, 0]
    x[m - 1] = 0
    w_scales[7] = value
    bias[9] = value
    found = op.call(x, weight, w_scales, bias)
    expected[m - 1] = bias
    expected[:, 7] = sums * value
    expected[m - 1, 7] = math.nan
    expected[:, 9] = value
    assert_equal(found, expected)


@each_op
def test_the_largest_and_smallest_numbers(op: Variant) -> None:
    """Sums are fp32, which bf16 shares the exponents of: far from 1 they are no less exact."""
    (x, weight, _, _), _ = op.case(20, 70, 200, dtype=BF16).make("cpu")
    ones = torch.ones(1)
    expected = op.call(x, weight, ones)
    for power in (2.0**-90, 2.0**90):
        assert_equal(op.call(x * power, weight, ones), expected * power)
        assert_equal(op.call(x * power, weight, ones / power), expected)
