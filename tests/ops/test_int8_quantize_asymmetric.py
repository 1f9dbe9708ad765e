"""int8_quantize_asymmetric beyond the contract's cases: bits, special values, products, errors."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int8_gemm, int8_quantize, int8_quantize_asymmetric
from effllm.ops.int8_quantize_asymmetric import int8_quantize_asymmetric_ref
from effllm.testing import hostile
from effllm.testing.cases.int8_quantize_asymmetric import (
    CASES,
    DTYPES,
    Int8QuantizeAsymmetricCase,
)
from effllm.testing.compare import assert_equal

INF, NAN, TINY = math.inf, math.nan, 2.0**-126


def round_to_fp32(value: Fraction) -> Fraction:
    """The nearest fp32, of two the even one."""
    unit = Fraction(2) ** (math.floor(math.log2(value)) - 23)
    return round(value / unit) * unit


def test_codes_scales_and_zeros_by_exact_arithmetic(device: str) -> None:
    """Rationals have no rounding of their own."""
    x = hostile.normal(3, 300, seed=4)
    x[1], x[2] = x[1].abs() + 1, -x[2].abs()
    codes, scales, zeros = int8_quantize_asymmetric(x.to(device))
    for row in range(3):
        values = [Fraction(value) for value in x[row].tolist()]
        low, high = min(0, *values), max(0, *values)
        scale = Fraction(scales[row, 0].item())
        assert scale == round_to_fp32(round_to_fp32(Fraction(high - low)) / 255)
        zero = zeros[row, 0].item()
        # Of fp32 quotients, halves among which this data does not have.
        assert zero == round(-low / scale) - 128
        for column in range(0, 300, 7):
            wanted = round(values[column] / scale) + zero
            assert codes[row, column].item() == min(max(wanted, -128), 127)
    assert zeros[1:].flatten().tolist() == [-128, 127]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_on_one_side_get_half_the_step(dtype: torch.dtype, device: str) -> None:
    x = hostile.normal(4, 512, dtype=dtype, device=device).abs()
    x[2:] *= -1
    codes, scales, zeros = int8_quantize_asymmetric(x)
    _, symmetric = int8_quantize(x)
    torch.testing.assert_close(scales, symmetric * (127 / 255))
    decoded = (codes.float() - zeros) * scales
    assert ((decoded - x.float()).abs() <= scales * 0.5001).all()


def test_zero_has_a_code_of_its_own(device: str) -> None:
    x = hostile.normal(50, 64, mean=0.0, device=device) + torch.linspace(-8, 8, 50)[:, None].to(
        device
    )
    x[:, 5], x[:, 6] = 0.0, -0.0
    codes, _, zeros = int8_quantize_asymmetric(x)
    assert_equal(codes[:, 5:6], zeros)
    assert_equal(codes[:, 6:7], zeros)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros(dtype: torch.dtype, device: str) -> None:
    x = torch.zeros(3, 200, dtype=dtype, device=device)
    x[0, 3] = -0.0
    x[1, 150] = -510
    codes, scales, zeros = int8_quantize_asymmetric(x)
    assert scales.flatten().tolist() == [1, 2, 1]
    assert zeros.flatten().tolist() == [0, 127, 0]
    assert codes[1, 150].item() == -128
    codes[1] -= 127
    assert codes.flatten().nonzero().flatten().tolist() == [350]


@pytest.mark.parametrize("value", [INF, -INF, NAN, -NAN])
def test_not_finite_is_nan_in_its_row_alone(value: float, device: str) -> None:
    x = hostile.normal(3, 256, device=device)
    wanted = int8_quantize_asymmetric(x)
    x[1, 200] = value
    for found, expected, special in zip(
        int8_quantize_asymmetric(x), wanted, (0, NAN, 0), strict=True
    ):
        expected[1] = special
        assert_equal(found, expected)


def test_smallest_and_largest_numbers(device: str) -> None:
    """Scales stay normal and finite numbers, quotients finite."""
    subnormal, largest = 2.0**-149, torch.finfo(torch.float32).max
    x = torch.tensor([[subnormal, -subnormal], [TINY, -TINY], [largest, -largest]], device=device)
    codes, scales, zeros = int8_quantize_asymmetric(x)
    assert scales.flatten().tolist()[:2] == [TINY, TINY]
    assert math.isfinite(scales[2].item())
    # -128, -127; and half of 255 is even to 128.
    assert zeros.flatten().tolist() == [-128, -127, 0]
    assert codes.tolist() == [[-128, -128], [-126, -128], [127, -128]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_what_the_codes_stand_for(dtype: torch.dtype, device: str) -> None:
    """And nearer to the exact ones than by symmetric codes, of activations above 0."""
    x = torch.nn.functional.gelu(hostile.normal(20, 300, device=device)).to(dtype)
    weight, w_scales = int8_quantize(hostile.normal(40, 300, device=device, seed=1))
    codes, scales, zeros = int8_quantize_asymmetric(x)
    out = int8_gemm(codes, scales, weight, w_scales, None, zeros, out_dtype=torch.float32)
    dense = weight.double() * w_scales.double()
    decoded = (codes.double() - zeros) * scales.double()
    torch.testing.assert_close(out.double(), decoded @ dense.T, rtol=1e-5, atol=1e-5)
    exact = x.double() @ dense.T
    symmetric = int8_gemm(*int8_quantize(x), weight, w_scales, out_dtype=torch.float32)
    assert (out - exact).norm() < 0.7 * (symmetric - exact).norm()


def test_results_do_not_depend_on_strides(device: str) -> None:
    x = hostile.normal(6, 200, dtype=torch.bfloat16, device=device)
    for name, view in hostile.odd_strides(x):
        wanted = int8_quantize_asymmetric(view.contiguous())
        for found, expected in zip(int8_quantize_asymmetric(view), wanted, strict=True):
            assert_equal(found, expected, name=name)


@pytest.mark.parametrize("shape", [(256,), (3, 5, 256), (2, 1, 3, 256), (2, 0, 256)])
def test_leading_dimensions(shape: tuple[int, ...], device: str) -> None:
    x = hostile.normal(*shape, device=device)
    results = int8_quantize_asymmetric(x)
    flat = int8_quantize_asymmetric(x.view(-1, 256))
    assert results[0].shape == shape
    assert results[1].shape == results[2].shape == (*shape[:-1], 1)
    for found, expected in zip(results, flat, strict=True):
        assert_equal(found.reshape(expected.shape), expected)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 300)),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-150, 126),
    mean=st.floats(-4, 4),
)
def test_any_size_and_magnitude_equals_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, exponent: int, mean: float
) -> None:
    x = (hostile.normal(*shape, mean=mean) * 2.0**exponent).to(dtype)
    wanted = int8_quantize_asymmetric_ref(x)
    for found, expected in zip(int8_quantize_asymmetric(x), wanted, strict=True):
        assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: Int8QuantizeAsymmetricCase) -> None:
    (x,), _ = case.make("cpu")
    wanted = int8_quantize_asymmetric(x)
    for found, expected in zip(int8_quantize_asymmetric(x.cuda()), wanted, strict=True):
        assert_equal(found.cpu(), expected)


@pytest.mark.gpu
def test_captured_as_the_very_first_call() -> None:
    x = hostile.normal(5, 384, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = int8_quantize_asymmetric(x)
    x.copy_(hostile.normal(5, 384, dtype=x.dtype, seed=7))
    graph.replay()
    for found, expected in zip(results, int8_quantize_asymmetric(x), strict=True):
        assert_equal(found, expected)


ERRORS = [
    (torch.ones(4, 128, dtype=torch.int32), "x must be float16, bfloat16 or float32, got"),
    (torch.ones(4, 128).double(), "x must be float16, bfloat16 or float32, got"),
    (torch.ones(()), r"x must be \[\.\.\., K\], got a scalar"),
]


@pytest.mark.parametrize(("x", "message"), ERRORS)
def test_errors(x: Tensor, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=f"effllm::int8_quantize_asymmetric: {message}"):
        int8_quantize_asymmetric(x.to(device))
