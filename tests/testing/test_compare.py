"""The tolerance law accepts what a right kernel gives and rejects each kind of wrong one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.testing import hostile
from effllm.testing.compare import (
    assert_close_to_reference,
    assert_equal,
    assert_result,
    one_minus_cosine,
)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """A matmul: rounded once from the exact result, exact, and all in the low precision."""
    x = hostile.normal(17, 96, dtype=request.param, seed=1)
    w = hostile.normal(96, 40, dtype=request.param, seed=2)
    exact = x.double() @ w.double()
    return exact.to(request.param), exact, x @ w


def test_a_result_rounded_once_passes(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    assert_close_to_reference(*problem, cosine=True)


def test_the_baseline_itself_passes(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    _, exact, plain = problem
    assert_close_to_reference(plain, exact, plain, cosine=True)


def test_one_wrong_element_is_found_with_both_values(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    actual, exact, plain = problem
    actual[5, 7] += 0.25 * actual[5].abs().max()
    with pytest.raises(
        AssertionError, match=r"at \[5, 7\]: got .* reference .* baseline .*1 of 680"
    ):
        assert_close_to_reference(actual, exact, plain)


def test_a_row_of_outliers_does_not_excuse_the_others() -> None:
    exact = torch.ones(4, 8, dtype=torch.float64)
    exact[0] = 1e6
    plain = exact.bfloat16()  # errs by thousands in the row of outliers
    actual = plain.clone()
    actual[2, 3] = 1.1
    with pytest.raises(AssertionError, match=r"at \[2, 3\]"):
        assert_close_to_reference(actual, exact, plain)


def test_an_outlier_in_its_row_may_err_by_one_step_of_its_own() -> None:
    exact = torch.ones(4, 64, dtype=torch.float64)
    exact[1, 5] = 8 + 2.0**-9  # in float16, the nearest are 8 and 8 + 2**-7
    actual = exact.half()
    actual[1, 5] = 8 + 2.0**-7
    assert_close_to_reference(actual, exact, exact)
    for row, dim, value in ((1, 5, 8 + 2.0**-6), (1, 6, 1 + 2.0**-8)):
        wrong = exact.half()
        wrong[row, dim] = value
        with pytest.raises(AssertionError, match=rf"at \[{row}, {dim}\]"):
            assert_close_to_reference(wrong, exact, exact)


def test_a_row_of_zeros_has_to_be_zero() -> None:
    exact = torch.zeros(3, 8, dtype=torch.float64)
    exact[0] = 1.0
    actual = exact.float()
    assert_close_to_reference(actual, exact, actual)
    actual[1, 2] = 1e-3
    with pytest.raises(AssertionError, match=r"at \[1, 2\]"):
        assert_close_to_reference(actual, exact, exact.float())


def test_a_small_error_everywhere_is_found_by_the_cosine() -> None:
    """Noise that stays within the element-wise bound, in every element."""
    exact = hostile.normal(64, 256, outliers=0.0).double()
    plain = exact.bfloat16()
    scale = exact.square().mean(-1, keepdim=True).sqrt()
    noise = torch.sign(torch.randn(exact.shape)) * scale * 2.0**-6
    actual = (exact + noise).bfloat16()
    assert_close_to_reference(actual, exact, plain)
    with pytest.raises(AssertionError, match="1 - cosine is"):
        assert_close_to_reference(actual, exact, plain, cosine=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_values_must_be_where_the_reference_has_them(value: float) -> None:
    exact = torch.ones(3, 4, dtype=torch.float64)
    actual = exact.float()
    actual[1, 2] = value
    with pytest.raises(AssertionError, match=r"first difference at \[1, 2\].*reference 1"):
        assert_close_to_reference(actual, exact, exact.float())
    exact[1, 2] = value
    assert_close_to_reference(actual, exact, exact.float(), cosine=True)


def test_overflow_of_the_format_is_expected() -> None:
    exact = torch.tensor([1.0, 1e5], dtype=torch.float64)
    actual = torch.tensor([1.0, float("inf")], dtype=torch.float16)
    assert_close_to_reference(actual, exact, actual)


def test_empty_and_scalar_results() -> None:
    empty = torch.empty(0, 4)
    assert_close_to_reference(empty, empty.double(), empty, cosine=True)
    scalar = torch.tensor(2.0)
    assert_close_to_reference(scalar, scalar.double(), scalar, cosine=True)


def test_shape_is_part_of_the_result() -> None:
    with pytest.raises(AssertionError, match=r"shape must be \[2, 3\], got \[3, 2\]"):
        assert_close_to_reference(
            torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3)
        )


def test_assert_equal() -> None:
    a = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    assert_equal(a, a.clone())
    with pytest.raises(
        AssertionError, match=r"1 of 4 elements differ.*\[1, 0\]: got 3, expected 9"
    ):
        assert_equal(a, torch.tensor([[1, 2], [9, 4]], dtype=torch.int32))
    with pytest.raises(AssertionError, match=r"dtype must be torch\.int64, got torch.int32"):
        assert_equal(a, a.long())
    nan = torch.tensor([float("nan"), 1.0])
    assert_equal(nan, nan.clone())


def test_the_reference_decides_how_exact_a_result_must_be() -> None:
    exact = torch.full((4,), 1.001, dtype=torch.float64)
    rounded = exact.bfloat16()
    assert_result(rounded, exact, rounded)
    assert_result(rounded, rounded.clone(), rounded)
    with pytest.raises(AssertionError, match="4 of 4 elements differ"):
        assert_result(rounded, rounded + 0.5, rounded)
    with pytest.raises(AssertionError, match=r"reference must be float64 or torch\.bfloat16"):
        assert_result(rounded, exact.float(), rounded)


def test_one_minus_cosine_keeps_its_digits() -> None:
    a = torch.tensor([1.0, 0.0])
    assert one_minus_cosine(a, a * 3) == 0
    assert one_minus_cosine(a, torch.tensor([1.0, 1e-6])) == pytest.approx(5e-13, rel=1e-3)
    assert one_minus_cosine(a, -a) == 2
