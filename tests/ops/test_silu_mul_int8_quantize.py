"""silu_mul_int8_quantize beyond the cases of the contract: codes of the exact product, special
values, layouts, errors. silu is that of silu_mul_fp8_quantize, and tested there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from effllm.ops import int8_quantize, silu_mul_int8_quantize
from effllm.ops.silu_mul_fp8_quantize import silu_mul_ref
from effllm.ops.silu_mul_int8_quantize import silu_mul_int8_quantize_ref
from effllm.testing import hostile
from effllm.testing.cases.silu_mul_int8_quantize import CASES, SiluMulInt8QuantizeCase
from effllm.testing.compare import assert_equal

INF, NAN = math.inf, math.nan
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Results = tuple[Tensor, Tensor]


def assert_same(found: Results, wanted: Results, name: str = "") -> None:
    assert_equal(found[0], wanted[0], name=f"{name} codes")
    assert_equal(found[1], wanted[1], name=f"{name} scales")


def pair(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Results:
    gate, up = (hostile.normal(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    return gate, up


def test_errs_by_half_a_step_of_the_exact_product(device: str) -> None:
    gate, up = pair(20, 600, device=device)
    codes, scales = silu_mul_int8_quantize(gate, up)
    exact = gate.double() * torch.sigmoid(gate.double()) * up.double()
    assert ((codes.double() * scales.double() - exact).abs() <= scales * 0.50001).all()
    assert (codes.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_torch_then_int8_quantize(dtype: torch.dtype, device: str) -> None:
    """torch has another exponential: now and then a product rounds to the neighbour of ours."""
    gate, up = pair(40, 1000, dtype=dtype, device=device)
    codes, scales = silu_mul_int8_quantize(gate, up)
    wanted_codes, wanted_scales = int8_quantize(silu(gate) * up)
    step = torch.finfo(dtype).eps
    assert ((scales / wanted_scales - 1).abs() <= 2 * max(step, 2.0**-20)).all()
    assert (codes != wanted_codes).float().mean() < 2e-3
    assert (codes.int() - wanted_codes.int()).abs().max() <= 1


def test_known_scale_saturates(device: str) -> None:
    gate = torch.tensor([1000.0, 1000, -1000, 1000, INF, 0, NAN, 1, 1], device=device)
    up = torch.tensor([0.127, 1.0, 1, -1e9, 1, 3, 1, INF, NAN], device=device)
    codes, scales = silu_mul_int8_quantize(gate, up, torch.ones(1, device=device))
    assert codes.tolist() == [127, 127, 0, -128, 127, 0, 0, 127, 0]
    assert scales.tolist() == [1]


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("value", [0.02, 0.0, INF, NAN])
def test_known_scale_is_that_of_int8_quantize(
    value: float, scale_dtype: torch.dtype, device: str
) -> None:
    gate, up = pair(9, 300, device=device)
    scale = torch.tensor([[value]], dtype=scale_dtype, device=device)
    found = silu_mul_int8_quantize(gate, up, scale)
    assert_same(found, int8_quantize(silu_mul_ref(gate, up), scale))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_not_finite_is_nan_in_its_row_alone(value: float, device: str) -> None:
    gate, up = pair(3, 256, device=device)
    for changed in (gate, up):
        codes, scales = silu_mul_int8_quantize(gate, up)
        kept = changed[1, 200].item()
        changed[1, 200] = value
        found = silu_mul_int8_quantize(gate, up)
        changed[1, 200] = kept
        codes[1], scales[1] = 0, NAN
        assert_same(found, (codes, scales))


def test_zeros_have_scale_one(device: str) -> None:
    zeros, ones = torch.zeros(3, 200, device=device), torch.ones(3, 200, device=device)
    for gate, up in ((zeros, ones), (ones, zeros)):
        codes, scales = silu_mul_int8_quantize(gate, up)
        assert (scales == 1).all()
        assert not codes.any()


def test_results_do_not_depend_on_strides(device: str) -> None:
    gate, up = pair(6, 200, dtype=torch.bfloat16, device=device)
    for name, view in hostile.odd_strides(gate):
        for args in ((view, up), (up, view)):
            found = silu_mul_int8_quantize(*args)
            assert_same(found, silu_mul_int8_quantize(*(arg.contiguous() for arg in args)), name)


def test_halves_of_a_tensor_of_any_rank_are_not_copied(device: str) -> None:
    gate_up = hostile.normal(2, 3, 5, 768, dtype=torch.float16, device=device)
    with torch.profiler.profile() as profile:
        codes, scales = silu_mul_int8_quantize(*gate_up.chunk(2, dim=-1))
    names = {event.name for event in profile.events()}
    assert "effllm::silu_mul_int8_quantize" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}
    assert codes.shape == (2, 3, 5, 384)
    wanted = silu_mul_int8_quantize(*gate_up.reshape(30, 768).chunk(2, dim=-1))
    assert_same((codes.view(30, 384), scales.flatten(0, -2)), wanted)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 300)),
    dtype=st.sampled_from(DTYPES),
    exponents=st.tuples(st.integers(-40, 30), st.integers(-40, 30)),
    static=st.booleans(),
)
def test_any_size_and_magnitude_equals_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, exponents: tuple[int, int], static: bool
) -> None:
    gate, up = (
        (hostile.normal(*shape, seed=seed) * 2.0**exponent).to(dtype)
        for seed, exponent in enumerate(exponents)
    )
    scale = torch.tensor(0.02) if static else None
    found = silu_mul_int8_quantize(gate, up, scale)
    assert_same(found, silu_mul_int8_quantize_ref(gate, up, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: SiluMulInt8QuantizeCase) -> None:
    args, _ = case.make("cpu")
    codes, scales = silu_mul_int8_quantize(*(arg.cuda() for arg in args))
    assert_same((codes.cpu(), scales.cpu()), silu_mul_int8_quantize(*args))


@pytest.mark.gpu
def test_captured_as_the_very_first_call() -> None:
    gate_up = hostile.normal(5, 768, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = silu_mul_int8_quantize(*gate_up.chunk(2, dim=-1))
    gate_up.copy_(hostile.normal(5, 768, seed=7))
    graph.replay()
    assert_same(found, silu_mul_int8_quantize(*gate_up.chunk(2, dim=-1)))


X = torch.ones(4, 128)
ERRORS: list[tuple[Any, ...]] = [
    (X.int(), X.int(), None, "gate must be float16, bfloat16 or float32, got int32"),
    (X.half(), X, None, "up must be float16, got float32"),
    (X, X[:3], None, r"up must be \[4, 128\] as gate is, got \[3, 128\]"),
    (X, X, torch.ones(2), r"scale must have one element, got \[2\]"),
    (X, X, torch.ones(1).int(), "scale must be float16, bfloat16 or float32, got int32"),
    (torch.ones(()), torch.ones(()), None, r"gate must be \[\.\.\., K\], got a scalar"),
]


@pytest.mark.parametrize(("gate", "up", "scale", "message"), ERRORS)
def test_errors(gate: Tensor, up: Tensor, scale: Tensor | None, message: str, device: str) -> None:
    scale = None if scale is None else scale.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::silu_mul_int8_quantize: {message}"):
        silu_mul_int8_quantize(gate.to(device), up.to(device), scale)


@pytest.mark.gpu
def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError, match="up must be on cuda:0 as gate is, got cpu"):
        silu_mul_int8_quantize(X.cuda(), X)
