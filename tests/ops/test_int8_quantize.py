"""int8_quantize beyond the cases of the contract: bits, special values, layouts, errors."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int8_quantize
from effllm.ops.int8_quantize import int8_quantize_ref
from effllm.testing import hostile
from effllm.testing.cases.int8_quantize import CASES, DTYPES, Int8QuantizeCase
from effllm.testing.compare import assert_equal

INF, NAN, TINY = math.inf, math.nan, 2.0**-126


def test_codes_and_scales_by_exact_arithmetic(device: str) -> None:
    """Rationals have no rounding of their own: a scale is the fp32 next to amax / 127, a code the
    integer next to the fp32 quotient, of two equally near ones the even one."""
    x = hostile.normal(3, 300, seed=4)
    codes, scales = int8_quantize(x.to(device))
    for row in range(3):
        exact = Fraction(x[row].abs().max().item()) / 127
        scale = scales[row, 0].item()
        # As far from fp32 as its neighbours allow: correctly rounded.
        assert abs(Fraction(scale) - exact) <= Fraction(math.ulp(scale)) * 2**28
        for column in range(0, 300, 7):
            quotient = (x[row, column] / torch.tensor(scale)).item()
            assert codes[row, column].item() == round(Fraction(quotient))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_scale_one_and_code_zero(dtype: torch.dtype, device: str) -> None:
    x = torch.zeros(3, 200, dtype=dtype, device=device)
    x[1, 150] = -254
    codes, scales = int8_quantize(x)
    assert scales.flatten().tolist() == [1, 2, 1]
    assert codes.flatten().nonzero().flatten().tolist() == [350]
    assert codes[1, 150].item() == -127


@pytest.mark.parametrize("value", [INF, -INF, NAN, -NAN])
def test_not_finite_is_nan_in_its_row_alone(value: float, device: str) -> None:
    x = hostile.normal(3, 256, device=device)
    expected_codes, expected_scales = int8_quantize(x)
    x[1, 200] = value
    codes, scales = int8_quantize(x)
    expected_scales[1], expected_codes[1] = NAN, 0
    assert_equal(scales, expected_scales)
    assert_equal(codes, expected_codes)


def test_smallest_and_largest_numbers(device: str) -> None:
    """Scales stay normal numbers, and quotients finite."""
    subnormal, largest = 2.0**-149, torch.finfo(torch.float32).max
    x = torch.tensor([[subnormal, -0.0], [TINY, -TINY], [largest, -largest]], device=device)
    codes, scales = int8_quantize(x)
    assert scales.flatten().tolist()[:2] == [TINY, TINY]
    assert codes.tolist() == [[0, 0], [1, -1], [127, -127]]


def test_known_scale_saturates_and_rounds_to_even(device: str) -> None:
    x = [0.5, 1.5, -0.5, -2.5, 126.5, 127.5, -127.5, -128.5, 1e30, -1e30, INF, -INF, NAN, -0.0]
    wanted = [0, 2, 0, -2, 126, 127, -128, -128, 127, -128, 127, -128, 0, 0]
    for factor in (1.0, 0.25, 2.0**-70, 2.0**70):
        scale = torch.tensor(factor, device=device)
        codes, used = int8_quantize(torch.tensor(x, device=device) * scale, scale)
        assert codes.tolist() == wanted
        assert used.tolist() == [factor]
    codes, _ = int8_quantize(-torch.tensor(x, device=device), torch.tensor(-1.0, device=device))
    assert codes.tolist() == wanted


@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_known_scales_that_are_no_scales(value: float, device: str) -> None:
    x = torch.tensor([[-2.0, 0.0, 3.0]], device=device)
    codes, used = int8_quantize(x, torch.tensor(value, device=device))
    assert codes.tolist() == [[-128, 0, 127] if value == 0 else [0, 0, 0]]
    assert_equal(used, torch.tensor([value], device=device))


@pytest.mark.parametrize("scale", [None, 0.03])
def test_results_do_not_depend_on_strides(scale: float | None, device: str) -> None:
    x = hostile.normal(6, 200, dtype=torch.bfloat16, device=device)
    known = None if scale is None else torch.tensor(scale, device=device)
    for name, view in hostile.odd_strides(x):
        codes, scales = int8_quantize(view, known)
        wanted_codes, wanted_scales = int8_quantize(view.contiguous(), known)
        assert_equal(codes, wanted_codes, name=name)
        assert_equal(scales, wanted_scales, name=name)


@pytest.mark.parametrize("shape", [(256,), (3, 5, 256), (2, 1, 3, 256), (2, 0, 256)])
def test_leading_dimensions(shape: tuple[int, ...], device: str) -> None:
    x = hostile.normal(*shape, device=device)
    codes, scales = int8_quantize(x)
    assert codes.shape == shape
    assert scales.shape == (*shape[:-1], 1)
    flat_codes, flat_scales = int8_quantize(x.view(-1, 256))
    assert_equal(codes.view(-1, 256), flat_codes)
    assert_equal(scales.reshape(-1, 1), flat_scales)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 300)),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 30),
    static=st.booleans(),
)
def test_any_size_and_magnitude_equals_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, exponent: int, static: bool
) -> None:
    x = (hostile.normal(*shape) * 2.0**exponent).to(dtype)
    scale = torch.tensor(2.0**exponent / 40) if static else None
    codes, scales = int8_quantize(x, scale)
    wanted_codes, wanted_scales = int8_quantize_ref(x, scale)
    assert_equal(codes, wanted_codes)
    assert_equal(scales, wanted_scales)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: Int8QuantizeCase) -> None:
    args, kwargs = case.make("cpu")
    codes, scales = int8_quantize(*args, **kwargs)
    gpu_codes, gpu_scales = int8_quantize(*(tensor.cuda() for tensor in args), **kwargs)
    assert_equal(gpu_codes.cpu(), codes)
    assert_equal(gpu_scales.cpu(), scales)


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_captured_as_the_very_first_call(static: bool) -> None:
    x = hostile.normal(5, 384, dtype=torch.bfloat16, device="cuda")
    scale = torch.tensor(0.03, device="cuda") if static else None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scales = int8_quantize(x, scale)
    x.copy_(hostile.normal(5, 384, dtype=x.dtype, seed=7))
    graph.replay()
    wanted_codes, wanted_scales = int8_quantize(x, scale)
    assert_equal(codes, wanted_codes)
    assert_equal(scales, wanted_scales)


ERRORS = [
    (torch.ones(4, 128, dtype=torch.int32), None, "x must be float16, bfloat16 or float32, got"),
    (torch.ones(4, 128).double(), None, "x must be float16, bfloat16 or float32, got"),
    (torch.ones(()), None, r"x must be \[\.\.\., K\], got a scalar"),
    (torch.ones(4, 128), torch.ones(4), r"scale must have one element, got \[4\]"),
    (torch.ones(4, 128), torch.ones(1).int(), "scale must be float16, .*, got int32"),
]


@pytest.mark.parametrize(("x", "scale", "message"), ERRORS)
def test_errors(x: Tensor, scale: Tensor | None, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=f"effllm::int8_quantize: {message}"):
        int8_quantize(x.to(device), None if scale is None else scale.to(device))
