"""rms_norm_int8_quantize beyond the cases of the contract: codes of the exact norm, special values,
layouts, errors. The norm is that of rms_norm_fp8_quantize, and tested there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int8_quantize, rms_norm_int8_quantize
from effllm.ops.rms_norm_fp8_quantize import rms_norm_ref
from effllm.ops.rms_norm_int8_quantize import rms_norm_int8_quantize_ref
from effllm.testing import hostile
from effllm.testing.cases.rms_norm_fp8_quantize import hugging_face_norm
from effllm.testing.cases.rms_norm_int8_quantize import CASES, RmsNormInt8QuantizeCase
from effllm.testing.compare import assert_equal

INF, NAN, EPS = math.inf, math.nan, 1e-5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Results = tuple[Tensor, Tensor]


def assert_same(found: Results, wanted: Results, name: str = "") -> None:
    assert_equal(found[0], wanted[0], name=f"{name} codes")
    assert_equal(found[1], wanted[1], name=f"{name} scales")


def test_errs_by_half_a_step_of_the_exact_norm(device: str) -> None:
    x, weight = hostile.normal(20, 600, device=device), hostile.normal(600, device=device, seed=1)
    codes, scales = rms_norm_int8_quantize(x, weight, eps=EPS)
    rms = (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    exact = x.double() / rms * weight.double()
    assert ((codes.double() * scales.double() - exact).abs() <= scales * 0.50001).all()
    assert (codes.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_norm_of_hugging_face_then_int8_quantize(dtype: torch.dtype, device: str) -> None:
    """Sums in another order: now and then an element rounds to the neighbour of ours, which may be
    a step of a row's largest."""
    x = hostile.normal(40, 1000, dtype=dtype, device=device)
    weight = hostile.normal(1000, dtype=dtype, device=device, seed=1)
    codes, scales = rms_norm_int8_quantize(x, weight, eps=EPS)
    wanted = int8_quantize(hugging_face_norm(x, weight, EPS))
    step = torch.finfo(dtype).eps
    assert ((scales / wanted[1] - 1).abs() <= 2 * max(step, 2.0**-20)).all()
    assert (codes != wanted[0]).float().mean() < 2e-3
    assert (codes.int() - wanted[0].int()).abs().max() <= 1


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("value", [0.02, 0.0, INF, NAN])
def test_known_scale_is_that_of_int8_quantize(
    value: float, scale_dtype: torch.dtype, device: str
) -> None:
    x, weight = hostile.normal(9, 300, device=device), hostile.normal(300, device=device, seed=1)
    scale = torch.tensor([[value]], dtype=scale_dtype, device=device)
    found = rms_norm_int8_quantize(x, weight, scale, eps=EPS)
    assert_same(found, int8_quantize(rms_norm_ref(x, weight, EPS), scale))
    assert found[1].shape == (1,)


@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_not_finite_is_nan_in_its_row_alone(value: float, device: str) -> None:
    x, weight = hostile.normal(3, 256, device=device), hostile.normal(256, device=device, seed=1)
    codes, scales = rms_norm_int8_quantize(x, weight, eps=EPS)
    x[1, 200] = value
    codes[1], scales[1] = 0, NAN
    assert_same(rms_norm_int8_quantize(x, weight, eps=EPS), (codes, scales))


def test_zeros(device: str) -> None:
    """0 / sqrt(eps) is 0, of scale 1; without eps it is 0 / 0."""
    x, weight = torch.zeros(3, 200, device=device), torch.ones(200, device=device)
    x[1] = -1
    codes, scales = rms_norm_int8_quantize(x, weight, eps=EPS)
    assert (scales[::2] == 1).all()
    assert not codes[::2].any()
    codes, scales = rms_norm_int8_quantize(x, weight, eps=0.0)
    assert scales[::2].isnan().all()
    assert not codes[::2].any()
    assert (codes[1] == -127).all()


@pytest.mark.parametrize("k", [200, 256])
def test_results_do_not_depend_on_strides(k: int, device: str) -> None:
    x = hostile.normal(6, k, dtype=torch.bfloat16, device=device)
    weight = hostile.normal(k, dtype=torch.bfloat16, device=device, seed=1)
    offset = dict(hostile.odd_strides(weight))["offset"]
    for name, view in hostile.odd_strides(x):
        wanted = rms_norm_int8_quantize(view.contiguous(), weight, eps=EPS)
        assert_same(rms_norm_int8_quantize(view, weight, eps=EPS), wanted, name)
        assert_same(rms_norm_int8_quantize(view, offset, eps=EPS), wanted, name)


def test_rows_do_not_depend_on_others_or_on_threads() -> None:
    x, weight = hostile.normal(300, 700), hostile.normal(700, seed=1)
    codes, scales = rms_norm_int8_quantize(x, weight, eps=EPS)
    alone = rms_norm_int8_quantize(x[77:78], weight, eps=EPS)
    assert_same(alone, (codes[77:78], scales[77:78]))
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        found = rms_norm_int8_quantize(x, weight, eps=EPS)
    finally:
        torch.set_num_threads(threads)
    assert_same(found, (codes, scales))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 700)),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 30),
    eps=st.sampled_from([0.0, 1e-6, 1e-5, 0.1]),
    static=st.booleans(),
)
def test_any_size_and_magnitude_equals_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, exponent: int, eps: float, static: bool
) -> None:
    x = (hostile.normal(*shape) * 2.0**exponent).to(dtype)
    weight = hostile.normal(shape[1], dtype=dtype, seed=1)
    scale = torch.tensor(0.02) if static else None
    found = rms_norm_int8_quantize(x, weight, scale, eps=eps)
    assert_same(found, rms_norm_int8_quantize_ref(x, weight, scale, eps=eps))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: RmsNormInt8QuantizeCase) -> None:
    args, options = case.make("cpu")
    codes, scales = rms_norm_int8_quantize(*(arg.cuda() for arg in args), **options)
    assert_same((codes.cpu(), scales.cpu()), rms_norm_int8_quantize(*args, **options))


@pytest.mark.gpu
def test_captured_as_the_very_first_call() -> None:
    x = hostile.normal(5, 384, dtype=torch.bfloat16, device="cuda")
    weight = hostile.normal(384, dtype=torch.bfloat16, device="cuda", seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rms_norm_int8_quantize(x, weight, eps=EPS)
    x.copy_(hostile.normal(5, 384, seed=7))
    graph.replay()
    assert_same(found, rms_norm_int8_quantize(x, weight, eps=EPS))


X, W = torch.ones(4, 128), torch.ones(128)
ERRORS: list[tuple[Any, ...]] = [
    (X.int(), W, None, EPS, "x must be float16, bfloat16 or float32, got int32"),
    (X.half(), W, None, EPS, "weight must be float16, got float32"),
    (X, W[:64], None, EPS, r"weight must be \[K\] = \[128\], got \[64\]"),
    (X, W, None, -1e-6, "eps must be finite and at least 0, got -0.000001"),
    (X, W, None, NAN, "eps must be finite and at least 0, got nan"),
    (X, W, W[:2], EPS, r"scale must have one element, got \[2\]"),
    (X, W, W[:1].int(), EPS, "scale must be float16, bfloat16 or float32, got int32"),
    (X[0, 0], W, None, EPS, r"x must be \[\.\.\., K\], got a scalar"),
]


@pytest.mark.parametrize(("x", "weight", "scale", "eps", "message"), ERRORS)
def test_errors(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, message: str, device: str
) -> None:
    scale = None if scale is None else scale.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::rms_norm_int8_quantize: {message}"):
        rms_norm_int8_quantize(x.to(device), weight.to(device), scale, eps=eps)
