"""silu_mul_fp8_quantize beyond the cases of the contract: silu itself, special values, layouts,
errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from effllm.ops import fp8_quantize, fp8_quantize_tensor, silu_mul_fp8_quantize
from effllm.ops.silu_mul_fp8_quantize import (
    silu_mul_fp8_quantize_ref,
    silu_mul_ref,
    silu_ref,
)
from effllm.testing import hostile
from effllm.testing.cases.silu_mul_fp8_quantize import CASES, SiluMulFp8QuantizeCase
from effllm.testing.compare import assert_equal

INF, NAN = math.inf, math.nan
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
every_group = pytest.mark.parametrize("group_size", [None, 128])
Results = tuple[Tensor, Tensor]


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def assert_same(found: Results, wanted: Results, name: str = "") -> None:
    assert_equal(bits(found[0]), bits(wanted[0]), name=f"{name} codes")
    assert_equal(found[1], wanted[1], name=f"{name} scales")


def test_silu_is_as_exact_as_it_says() -> None:
    """The reference, whose bits the op has, against float64."""
    g = torch.cat([torch.linspace(-70, 120, 400_001), torch.linspace(-1, 1, 100_001)])
    exact = g.double() * torch.sigmoid(g.double())
    error = (silu_ref(g).double() - exact).abs()
    assert (error <= 2.0**-21 * (1 + g.abs() / 4) * exact.abs()).all()
    ends = torch.tensor([-INF, -1e30, -70.1, -0.0, 0.0, 1e30, INF, NAN])
    assert_equal(silu_ref(ends), torch.tensor([NAN, -0.0, -0.0, -0.0, 0.0, 1e30, INF, NAN]))


def test_silu_to_the_bit(device: str) -> None:
    """A row for each value, whose code is then 448 and whose scale is silu / 448."""
    powers = 2.0 ** torch.arange(-20.0, 7.0)
    g = torch.cat([sign * powers * factor for sign in (1, -1) for factor in (1, 1.37, 1.9)])
    g = g[g > -70]  # below, silu is 0
    rows = g[:, None].to(device)
    codes, scales = silu_mul_fp8_quantize(rows, torch.ones_like(rows))
    wanted = silu_ref(g)[:, None]
    assert_equal(scales.cpu(), wanted.abs() / torch.full_like(wanted, 448))
    assert_equal(codes.float().cpu(), wanted.sign() * 448)


@every_group
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_torch_then_fp8_quantize(
    dtype: torch.dtype, group_size: int | None, device: str
) -> None:
    """torch has another exponential: now and then a product rounds to the neighbour of ours."""
    gate = hostile.normal(40, 1000, dtype=dtype, device=device)
    up = hostile.normal(40, 1000, dtype=dtype, device=device, seed=1)
    codes, scales = silu_mul_fp8_quantize(gate, up, group_size=group_size)
    wanted_codes, wanted_scales = fp8_quantize(silu(gate) * up, group_size=group_size)
    step = torch.finfo(dtype).eps
    assert ((scales / wanted_scales - 1).abs() <= 2 * max(step, 2.0**-20)).all()
    assert (bits(codes) != bits(wanted_codes)).float().mean() < 2e-3
    assert (bits(codes).int() - bits(wanted_codes).int()).abs().max() <= 1


@every_group
def test_errs_by_half_a_step_of_the_exact_product(group_size: int | None, device: str) -> None:
    gate, up = (hostile.normal(20, 600, device=device, seed=seed) for seed in (0, 1))
    codes, scales = silu_mul_fp8_quantize(gate, up, group_size=group_size)
    exact = gate.double() * torch.sigmoid(gate.double()) * up.double()
    per_element = scales.double().repeat_interleave(group_size or 600, dim=-1)[:, :600]
    error = (codes.double() * per_element - exact).abs()
    # Half of 1/8 of the power of two below, or of the subnormals' 2^-9.
    half_step = torch.maximum(exact.abs() * 2.0**-4, per_element * 2.0**-10)
    assert (error <= half_step * (1 + 1e-5)).all()


def test_known_scale_saturates_and_keeps_nan(device: str) -> None:
    gate = torch.tensor([1000.0, 1000, -1000, 1000, INF, 0, NAN, 1, 1], device=device)
    up = torch.tensor([0.448, 1.0, 1, -1e9, 1, 3, 1, INF, NAN], device=device)
    codes, scales = silu_mul_fp8_quantize(gate, up, torch.ones(1, device=device))
    assert bits(codes).tolist() == [0x7E, 0x7E, 0x80, 0xFE, 0x7E, 0, 0x7F, 0x7E, 0x7F]
    assert scales.tolist() == [1]


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("value", [0.02, 0.0, INF, NAN])
def test_known_scale_is_that_of_fp8_quantize_tensor(
    value: float, scale_dtype: torch.dtype, device: str
) -> None:
    gate, up = (hostile.normal(9, 300, device=device, seed=seed) for seed in (0, 1))
    scale = torch.tensor([[value]], dtype=scale_dtype, device=device)
    found = silu_mul_fp8_quantize(gate, up, scale)
    assert_same(found, fp8_quantize_tensor(silu_mul_ref(gate, up), scale))


@every_group
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_not_finite_is_nan_in_its_group_alone(
    value: float, group_size: int | None, device: str
) -> None:
    gate, up = (hostile.normal(3, 256, device=device, seed=seed) for seed in (0, 1))
    for changed in (gate, up):
        wanted_codes, wanted_scales = silu_mul_fp8_quantize(gate, up, group_size=group_size)
        kept = changed[1, 200].item()
        changed[1, 200] = value
        found = silu_mul_fp8_quantize(gate, up, group_size=group_size)
        changed[1, 200] = kept
        bits(wanted_codes)[1, 0 if group_size is None else 128 :] = 0
        wanted_scales[1, -1] = NAN
        assert_same(found, (wanted_codes, wanted_scales))


@every_group
def test_zeros_have_scale_one(group_size: int | None, device: str) -> None:
    zeros, ones = torch.zeros(3, 200, device=device), torch.ones(3, 200, device=device)
    for gate, up in ((zeros, ones), (ones, zeros)):
        codes, scales = silu_mul_fp8_quantize(gate, up, group_size=group_size)
        assert (scales == 1).all()
        assert not bits(codes).any()


@every_group
def test_results_do_not_depend_on_strides(group_size: int | None, device: str) -> None:
    gate, up = (
        hostile.normal(6, 200, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 1)
    )
    for name, view in hostile.odd_strides(gate):
        for args in ((view, up), (up, view)):
            found = silu_mul_fp8_quantize(*args, group_size=group_size)
            dense = (arg.contiguous() for arg in args)
            assert_same(found, silu_mul_fp8_quantize(*dense, group_size=group_size), name)


@every_group
def test_halves_of_a_tensor_of_any_rank_are_not_copied(group_size: int | None, device: str) -> None:
    gate_up = hostile.normal(2, 3, 5, 768, dtype=torch.float16, device=device)
    gate, up = gate_up.chunk(2, dim=-1)
    with torch.profiler.profile() as profile:
        codes, scales = silu_mul_fp8_quantize(gate, up, group_size=group_size)
    names = {event.name for event in profile.events()}
    assert "effllm::silu_mul_fp8_quantize" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}
    assert codes.shape == (2, 3, 5, 384)
    flat = gate_up.reshape(30, 768).chunk(2, dim=-1)
    wanted_codes, wanted_scales = silu_mul_fp8_quantize(*flat, group_size=group_size)
    assert_same((codes.view(30, 384), scales.flatten(0, -2)), (wanted_codes, wanted_scales))
    assert scales.flatten(0, -2).stride() == wanted_scales.stride()


def test_one_dimension_is_one_row(device: str) -> None:
    gate, up = (hostile.normal(300, device=device, seed=seed) for seed in (0, 1))
    codes, scales = silu_mul_fp8_quantize(gate, up, group_size=128)
    assert scales.shape == (3,)
    assert_same(
        (codes[None], scales[None]), silu_mul_fp8_quantize_ref(gate[None], up[None], group_size=128)
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 300)),
    group_size=st.sampled_from([None, 128]),
    dtype=st.sampled_from(DTYPES),
    exponents=st.tuples(st.integers(-40, 30), st.integers(-40, 30)),
)
def test_any_size_and_magnitude_equals_the_reference(
    shape: tuple[int, int],
    group_size: int | None,
    dtype: torch.dtype,
    exponents: tuple[int, int],
) -> None:
    gate, up = (
        (hostile.normal(*shape, seed=seed) * 2.0**exponent).to(dtype)
        for seed, exponent in enumerate(exponents)
    )
    found = silu_mul_fp8_quantize(gate, up, group_size=group_size)
    assert_same(found, silu_mul_fp8_quantize_ref(gate, up, group_size=group_size))


def test_results_do_not_depend_on_threads() -> None:
    gate, up = (hostile.normal(300, 700, seed=seed) for seed in (0, 1))
    found = silu_mul_fp8_quantize(gate, up, group_size=128)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert_same(found, silu_mul_fp8_quantize(gate, up, group_size=128))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: SiluMulFp8QuantizeCase) -> None:
    args, options = case.make("cpu")
    codes, scales = silu_mul_fp8_quantize(*(arg.cuda() for arg in args), **options)
    assert_same((codes.cpu(), scales.cpu()), silu_mul_fp8_quantize(*args, **options))


@pytest.mark.gpu
def test_gpu_silu_over_all_16_bit_numbers() -> None:
    """Each is a row of its own, so that its scale tells silu to the bit."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16)[:, None]
    for dtype in (torch.float16, torch.bfloat16):
        gate = numbers.view(dtype).float()
        found = silu_mul_fp8_quantize(gate.cuda(), torch.ones_like(gate).cuda())
        wanted = silu_mul_fp8_quantize(gate, torch.ones_like(gate))
        assert_same((found[0].cpu(), found[1].cpu()), wanted, str(dtype))


@pytest.mark.gpu
@every_group
def test_captured_as_the_very_first_call(group_size: int | None) -> None:
    gate_up = hostile.normal(5, 768, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = silu_mul_fp8_quantize(*gate_up.chunk(2, dim=-1), group_size=group_size)
    gate_up.copy_(hostile.normal(5, 768, seed=7))
    graph.replay()
    assert_same(found, silu_mul_fp8_quantize(*gate_up.chunk(2, dim=-1), group_size=group_size))


X = torch.ones(4, 128)
ONE = torch.ones(1)
ERRORS = [
    (X.int(), X.int(), None, None, "gate must be float16, bfloat16 or float32, got int32"),
    (X.half(), X, None, None, "up must be float16, got float32"),
    (X, X[:3], None, None, r"up must be \[4, 128\] as gate is, got \[3, 128\]"),
    (X, X[None], None, None, r"up must be \[4, 128\] as gate is, got \[1, 4, 128\]"),
    (X, X, None, 64, "group_size must be 128, or None for one scale per row, got 64"),
    (X, X, ONE, 128, "group_size must be None with a scale of all rows, got 128"),
    (X, X, torch.ones(2), None, r"scale must have one element, got \[2\]"),
    (X, X, ONE.int(), None, "scale must be float16, bfloat16 or float32, got int32"),
    (torch.ones(()), torch.ones(()), None, None, r"gate must be \[\.\.\., K\], got a scalar"),
]


@pytest.mark.parametrize(("gate", "up", "scale", "group_size", "message"), ERRORS)
def test_errors(
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None,
    group_size: int | None,
    message: str,
    device: str,
) -> None:
    scale = None if scale is None else scale.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::silu_mul_fp8_quantize: {message}"):
        silu_mul_fp8_quantize(gate.to(device), up.to(device), scale, group_size=group_size)


@pytest.mark.gpu
def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError, match="up must be on cuda:0 as gate is, got cpu"):
        silu_mul_fp8_quantize(X.cuda(), X)
