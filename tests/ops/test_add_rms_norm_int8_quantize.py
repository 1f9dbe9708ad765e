"""add_rms_norm_int8_quantize beyond the cases of the contract: the sum, layouts, errors. All else
is rms_norm_int8_quantize of the sum, and tested there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import add_rms_norm_int8_quantize, rms_norm_int8_quantize
from effllm.testing import hostile
from effllm.testing.cases.add_rms_norm_int8_quantize import CASES, AddRmsNormInt8QuantizeCase
from effllm.testing.compare import assert_equal

EPS = 1e-5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Results = tuple[Tensor, Tensor, Tensor]


def assert_same(found: Results, wanted: Results, name: str = "") -> None:
    for index, (tensor, expected) in enumerate(zip(found, wanted, strict=True)):
        assert_equal(tensor, expected, name=f"{name} result {index}")


def problem(
    *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = (hostile.normal(*shape, dtype=dtype, device=device, seed=s) for s in (0, 1))
    return x, residual * 7, hostile.normal(shape[-1], dtype=dtype, device=device, seed=2)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_sum_then_rms_norm_int8_quantize(
    dtype: torch.dtype, static: bool, device: str
) -> None:
    x, residual, weight = problem(2, 5, 1000, dtype=dtype, device=device)
    scale = torch.tensor(0.01, device=device) if static else None
    before = x.clone(), residual.clone()
    found = add_rms_norm_int8_quantize(x, residual, weight, scale, eps=EPS)
    total = x + residual
    assert_same(found, (*rms_norm_int8_quantize(total, weight, scale, eps=EPS), total))
    assert found[2].is_contiguous()
    assert_equal(x, before[0])
    assert_equal(residual, before[1])


def test_a_sum_beyond_fp16_is_infinity(device: str) -> None:
    x = torch.full((2, 128), 4e4, dtype=torch.float16, device=device)
    x[1] = 1
    weight = torch.ones(128, dtype=torch.float16, device=device)
    codes, scales, out = add_rms_norm_int8_quantize(x, x, weight, eps=EPS)
    assert (out[0] == torch.inf).all()
    assert (out[1] == 2).all()
    assert scales[0].isnan().all()
    assert not codes[0].any()
    assert (codes[1] == 127).all()


@pytest.mark.parametrize("k", [200, 256])
def test_results_do_not_depend_on_strides(k: int, device: str) -> None:
    x, residual, weight = problem(6, k, device=device)
    for name, view in hostile.odd_strides(x):
        for args in ((view, residual), (residual, view)):
            found = add_rms_norm_int8_quantize(*args, weight, eps=EPS)
            dense = (arg.contiguous() for arg in args)
            assert_same(found, add_rms_norm_int8_quantize(*dense, weight, eps=EPS), name)


def test_residual_may_be_x(device: str) -> None:
    x, _, weight = problem(3, 384, device=device)
    found = add_rms_norm_int8_quantize(x, x, weight, eps=EPS)
    assert_same(found, add_rms_norm_int8_quantize(x, x.clone(), weight, eps=EPS))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: AddRmsNormInt8QuantizeCase) -> None:
    args, options = case.make("cpu")
    codes, scales, out = add_rms_norm_int8_quantize(*(arg.cuda() for arg in args), **options)
    wanted = add_rms_norm_int8_quantize(*args, **options)
    assert_same((codes.cpu(), scales.cpu(), out.cpu()), wanted)


@pytest.mark.gpu
def test_captured_as_the_very_first_call() -> None:
    x, residual, weight = problem(5, 384, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = add_rms_norm_int8_quantize(x, residual, weight, eps=EPS)
    residual.copy_(hostile.normal(5, 384, seed=7))
    graph.replay()
    assert_same(found, add_rms_norm_int8_quantize(x, residual, weight, eps=EPS))


X, W = torch.ones(4, 128), torch.ones(128)
ERRORS: list[tuple[Any, ...]] = [
    (X.half(), X, W, "residual must be float16, got float32"),
    (X, X[:3], W, r"residual must be \[4, 128\] as x is, got \[3, 128\]"),
    (X, X[0], W, r"residual must be \[4, 128\] as x is, got \[128\]"),
    (X, X, W[:64], r"weight must be \[K\] = \[128\], got \[64\]"),
]


@pytest.mark.parametrize(("x", "residual", "weight", "message"), ERRORS)
def test_errors(x: Tensor, residual: Tensor, weight: Tensor, message: str, device: str) -> None:
    args = (x.to(device), residual.to(device), weight.to(device))
    with pytest.raises(RuntimeError, match=f"effllm::add_rms_norm_int8_quantize: {message}"):
        add_rms_norm_int8_quantize(*args, eps=EPS)
