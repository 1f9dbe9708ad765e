"""fp8_quantize beyond the cases of the contract: bits, special values, layouts, errors."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import fp8_quantize
from effllm.ops.fp8_quantize import fp8_quantize_ref
from effllm.testing import hostile
from effllm.testing.cases.fp8_quantize import CASES, Fp8QuantizeCase
from effllm.testing.compare import assert_equal

INF, NAN, TINY = math.inf, math.nan, 2.0**-126
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
every_group = pytest.mark.parametrize("group_size", [None, 128])


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def e4m3_values() -> list[Fraction]:
    """The magnitudes of codes 0 .. 126 by the definition of the format."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        lead = 8 if exponent else 0
        values.append(Fraction(lead + mantissa) * Fraction(2) ** (max(exponent, 1) - 10))
    return values


def nearest_code(x: Fraction) -> int:
    """The code nearest to |x|, of two equally near ones the even one."""
    return min(range(127), key=lambda code: (abs(E4M3[code] - x), code % 2))


E4M3 = e4m3_values()


@every_group
def test_codes_and_scales_by_exact_arithmetic(group_size: int | None, device: str) -> None:
    """Rationals have no rounding of their own: a scale is the fp32 next to amax / 448, a code the
    e4m3 next to the fp32 quotient."""
    x = hostile.normal(3, 300, seed=4)
    codes, scales = fp8_quantize(x.to(device), group_size=group_size)
    for row in range(3):
        for column in range(0, 300, 7):
            group = 0 if group_size is None else column // group_size
            members = x[row] if group_size is None else x[row, 128 * group : 128 * group + 128]
            exact = Fraction(members.abs().max().item()) / 448
            scale = scales[row, group].item()
            # As far from fp32 as its neighbours allow: correctly rounded.
            assert abs(Fraction(scale) - exact) <= Fraction(math.ulp(scale)) * 2**28
            quotient = (x[row, column] / torch.tensor(scale)).item()
            wanted = nearest_code(Fraction(abs(quotient))) + (128 if quotient < 0 else 0)
            assert bits(codes)[row, column].item() == wanted


@every_group
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_scale_one_and_code_zero(
    group_size: int | None, dtype: torch.dtype, device: str
) -> None:
    x = torch.zeros(3, 200, dtype=dtype, device=device)
    x[1, 150] = 3.5
    codes, scales = fp8_quantize(x, group_size=group_size)
    assert scales[0].tolist() == scales[2].tolist() == [1.0] * scales.shape[1]
    assert scales[1, -1].item() == 2.0**-7
    assert not bits(codes)[[0, 2]].any()
    assert bits(codes)[1].nonzero().flatten().tolist() == [150]
    assert codes[1, 150].float().item() == 448


@every_group
@pytest.mark.parametrize("value", [INF, -INF, NAN, -NAN])
def test_not_finite_is_nan_in_its_group_alone(
    value: float, group_size: int | None, device: str
) -> None:
    x = hostile.normal(3, 256, device=device)
    expected_codes, expected_scales = fp8_quantize(x, group_size=group_size)
    x[1, 200] = value
    codes, scales = fp8_quantize(x, group_size=group_size)
    first = 0 if group_size is None else 128
    assert scales[1, -1].isnan()
    assert not bits(codes)[1, first:].any()
    expected_scales[1, -1] = NAN
    assert_equal(scales, expected_scales)
    bits(expected_codes)[1, first:] = 0
    assert_equal(bits(codes), bits(expected_codes))


def test_smallest_and_largest_numbers(device: str) -> None:
    """Scales stay normal numbers, and quotients finite."""
    subnormal, largest = 2.0**-149, torch.finfo(torch.float32).max
    x = torch.tensor([[subnormal, -0.0], [TINY, -TINY], [largest, -largest]], device=device)
    codes, scales = fp8_quantize(x)
    assert scales.flatten().tolist()[:2] == [TINY, TINY]
    assert bits(codes).tolist()[0] == [0, 0x80]
    assert codes.float().tolist()[1:] == [[1, -1], [448, -448]]


@every_group
def test_results_do_not_depend_on_strides(group_size: int | None, device: str) -> None:
    x = hostile.normal(6, 200, dtype=torch.bfloat16, device=device)
    for name, view in hostile.odd_strides(x):
        codes, scales = fp8_quantize(view, group_size=group_size)
        wanted_codes, wanted_scales = fp8_quantize(view.contiguous(), group_size=group_size)
        assert_equal(bits(codes), bits(wanted_codes), name=name)
        assert_equal(scales, wanted_scales, name=name)


@pytest.mark.parametrize("shape", [(256,), (3, 5, 256), (2, 1, 3, 256), (2, 0, 256)])
@every_group
def test_scales_lie_by_group_at_multiples_of_16_bytes(
    shape: tuple[int, ...], group_size: int | None, device: str
) -> None:
    codes, scales = fp8_quantize(hostile.normal(*shape, device=device), group_size=group_size)
    groups = 1 if group_size is None else 2
    assert codes.shape == shape
    assert scales.shape == (*shape[:-1], groups)
    rows = scales.numel() // groups
    if rows > 1 and groups > 1:
        flat = scales.flatten(0, -2)
        assert flat.data_ptr() == scales.data_ptr()  # one view: no copy
        assert flat.stride() == (1, (rows + 3) // 4 * 4)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 300)),
    group_size=st.sampled_from([None, 128]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 30),
)
def test_any_size_and_magnitude_equals_the_reference(
    shape: tuple[int, int], group_size: int | None, dtype: torch.dtype, exponent: int
) -> None:
    x = (hostile.normal(*shape) * 2.0**exponent).to(dtype)
    codes, scales = fp8_quantize(x, group_size=group_size)
    wanted_codes, wanted_scales = fp8_quantize_ref(x, group_size=group_size)
    assert_equal(bits(codes), bits(wanted_codes))
    assert_equal(scales, wanted_scales)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: Fp8QuantizeCase) -> None:
    (x,), kwargs = case.make("cpu")
    codes, scales = fp8_quantize(x, **kwargs)
    gpu_codes, gpu_scales = fp8_quantize(x.cuda(), **kwargs)
    assert_equal(bits(gpu_codes).cpu(), bits(codes))
    assert_equal(gpu_scales.cpu(), scales)


@pytest.mark.gpu
def test_every_fp32_quotient_rounds_as_on_the_cpu() -> None:
    """All floats around the codes, the halves between them and both ends, in rows of scale 1."""
    middles = torch.tensor([float(a + b) / 2 for a, b in itertools.pairwise(E4M3)])
    points = torch.cat([middles, torch.tensor([float(value) for value in E4M3])])
    near = [points]
    for towards in (INF, -INF):
        near.append(torch.nextafter(points, torch.full_like(points, towards)))
    values = torch.cat(near).clamp(-448, 448)
    rows = torch.stack([values, -values])
    rows[:, 0] = 448
    codes, scales = fp8_quantize(rows)
    assert scales.flatten().tolist() == [1, 1]
    gpu_codes, _ = fp8_quantize(rows.cuda())
    assert_equal(bits(gpu_codes).cpu(), bits(codes))


@pytest.mark.gpu
@every_group
def test_captured_as_the_very_first_call(group_size: int | None) -> None:
    x = hostile.normal(5, 384, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scales = fp8_quantize(x, group_size=group_size)
    x.copy_(hostile.normal(5, 384, dtype=x.dtype, seed=7))
    graph.replay()
    wanted_codes, wanted_scales = fp8_quantize(x, group_size=group_size)
    assert_equal(bits(codes), bits(wanted_codes))
    assert_equal(scales, wanted_scales)


ERRORS = [
    (torch.ones(4, 128), 64, "group_size must be 128, or None for one scale per row, got 64"),
    (torch.ones(4, 128), 0, "group_size must be 128, or None for one scale per row, got 0"),
    (torch.ones(4, 128, dtype=torch.int32), None, "x must be float16, bfloat16 or float32, got"),
    (torch.ones(4, 128).double(), None, "x must be float16, bfloat16 or float32, got"),
    (torch.ones(()), None, r"x must be \[\.\.\., K\], got a scalar"),
]


@pytest.mark.parametrize(("x", "group_size", "message"), ERRORS)
def test_errors(x: Tensor, group_size: int | None, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=f"effllm::fp8_quantize: {message}"):
        fp8_quantize(x.to(device), group_size=group_size)
