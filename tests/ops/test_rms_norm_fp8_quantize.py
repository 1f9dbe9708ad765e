"""rms_norm_fp8_quantize beyond the cases of the contract: the norm itself, special values, layouts,
errors. What it shares with silu_mul_fp8_quantize, codes and scales of rows, is tested there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import fp8_quantize, fp8_quantize_tensor, rms_norm_fp8_quantize
from effllm.ops.rms_norm_fp8_quantize import (
    rms_norm_fp8_quantize_ref,
    rms_norm_ref,
    sum_of_squares_ref,
)
from effllm.testing import hostile
from effllm.testing.cases.rms_norm_fp8_quantize import (
    CASES,
    RmsNormFp8QuantizeCase,
    hugging_face_norm,
)
from effllm.testing.compare import assert_equal

INF, NAN, EPS = math.inf, math.nan, 1e-5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
every_group = pytest.mark.parametrize("group_size", [None, 128])
Results = tuple[Tensor, Tensor]


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def assert_same(found: Results, wanted: Results, name: str = "") -> None:
    assert_equal(bits(found[0]), bits(wanted[0]), name=f"{name} codes")
    assert_equal(found[1], wanted[1], name=f"{name} scales")


@pytest.mark.parametrize("k", [1, 8, 100, 512, 513, 4096, 12345])
def test_order_of_the_sum(k: int) -> None:
    """The reference's order, whose bits the op has, by loops over what the contract says."""
    row = hostile.normal(k, seed=k).numpy()
    lanes = 32
    while lanes < min(-(-k // 16), 512):
        lanes *= 2
    sums = np.zeros((lanes, 8), np.float32)
    for column, value in enumerate(row):
        sums[column // 8 % lanes, column % 8] += np.float32(value * value)
    parts = list(sums.flatten())
    for size in (8, 32, lanes // 32):  # elements of a lane, lanes of a warp, warps
        folded = []
        for first in range(0, len(parts), size):
            part = parts[first : first + size]
            while len(part) > 1:
                half = len(part) // 2
                part = [a + b for a, b in zip(part[:half], part[half:], strict=True)]
            folded += part
        parts = folded
    assert sum_of_squares_ref(torch.from_numpy(row)).item() == parts[0]


@every_group
def test_errs_by_half_a_step_of_the_exact_norm(group_size: int | None, device: str) -> None:
    x, weight = hostile.normal(20, 600, device=device), hostile.normal(600, device=device, seed=1)
    codes, scales = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=group_size)
    rms = (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    exact = x.double() / rms * weight.double()
    per_element = scales.double().repeat_interleave(group_size or 600, dim=-1)[:, :600]
    error = (codes.double() * per_element - exact).abs()
    # Half of 1/8 of the power of two below, or of the subnormals' 2^-9.
    half_step = torch.maximum(exact.abs() * 2.0**-4, per_element * 2.0**-10)
    assert (error <= half_step * (1 + 1e-5)).all()


@every_group
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_norm_of_hugging_face_then_fp8_quantize(
    dtype: torch.dtype, group_size: int | None, device: str
) -> None:
    """Sums in another order: now and then an element rounds to the neighbour of ours."""
    x = hostile.normal(40, 1000, dtype=dtype, device=device)
    weight = hostile.normal(1000, dtype=dtype, device=device, seed=1)
    codes, scales = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=group_size)
    wanted = fp8_quantize(hugging_face_norm(x, weight, EPS), group_size=group_size)
    step = torch.finfo(dtype).eps
    assert ((scales / wanted[1] - 1).abs() <= 2 * max(step, 2.0**-20)).all()
    assert (bits(codes) != bits(wanted[0])).float().mean() < 2e-3
    assert (bits(codes).int() - bits(wanted[0]).int()).abs().max() <= 1


def test_the_norm_of_the_case_is_that_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, weight = hostile.normal(5, 256, dtype=torch.bfloat16), hostile.normal(256, seed=1).bfloat16()
    norm = llama.LlamaRMSNorm(256, eps=EPS).bfloat16()
    norm.weight.data = weight
    assert_equal(hugging_face_norm(x, weight, EPS), norm(x).detach())


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("value", [0.005, 0.0, INF, NAN])
def test_known_scale_is_that_of_fp8_quantize_tensor(
    value: float, scale_dtype: torch.dtype, device: str
) -> None:
    x, weight = hostile.normal(9, 300, device=device), hostile.normal(300, device=device, seed=1)
    scale = torch.tensor([[value]], dtype=scale_dtype, device=device)
    found = rms_norm_fp8_quantize(x, weight, scale, eps=EPS)
    assert_same(found, fp8_quantize_tensor(rms_norm_ref(x, weight, EPS), scale))


@every_group
@pytest.mark.parametrize("value", [NAN, -NAN])
def test_nan_is_nan_in_its_row_alone(value: float, group_size: int | None, device: str) -> None:
    x, weight = hostile.normal(3, 256, device=device), hostile.normal(256, device=device, seed=1)
    wanted_codes, wanted_scales = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=group_size)
    x[1, 200] = value
    found = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=group_size)
    bits(wanted_codes)[1] = 0
    wanted_scales[1] = NAN
    assert_same(found, (wanted_codes, wanted_scales))


@pytest.mark.parametrize("value", [INF, -INF, 3e38])
def test_what_is_beyond_all_others(value: float, device: str) -> None:
    """The mean of squares is infinite: infinity over it is NaN, all else is 0."""
    x, weight = hostile.normal(2, 256, device=device), torch.ones(256, device=device)
    x[1, 200] = value
    codes, scales = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=128)
    assert not bits(codes)[1].logical_and(bits(codes)[1] != 0x80).any()
    assert scales[1, 0].item() == 1
    assert scales[1, 1].isnan().item() == math.isinf(value)


@every_group
def test_zeros(group_size: int | None, device: str) -> None:
    """0 / sqrt(eps) is 0, of scale 1; without eps it is 0 / 0."""
    x, weight = torch.zeros(3, 200, device=device), torch.ones(200, device=device)
    x[1] = 1
    codes, scales = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=group_size)
    assert (scales[::2] == 1).all()
    assert not bits(codes)[::2].any()
    codes, scales = rms_norm_fp8_quantize(x, weight, eps=0.0, group_size=group_size)
    assert scales[::2].isnan().all()
    assert not bits(codes)[::2].any()
    assert (codes[1].float() == 448).all()


@every_group
@pytest.mark.parametrize("k", [200, 256])
def test_results_do_not_depend_on_strides(k: int, group_size: int | None, device: str) -> None:
    x = hostile.normal(6, k, dtype=torch.bfloat16, device=device)
    weight = hostile.normal(k, dtype=torch.bfloat16, device=device, seed=1)
    offset = dict(hostile.odd_strides(weight))["offset"]
    options: dict[str, Any] = {"eps": EPS, "group_size": group_size}
    for name, view in hostile.odd_strides(x):
        wanted = rms_norm_fp8_quantize(view.contiguous(), weight, **options)
        assert_same(rms_norm_fp8_quantize(view, weight, **options), wanted, name)
        assert_same(rms_norm_fp8_quantize(view, offset, **options), wanted, name)


def test_rows_apart_are_not_copied(device: str) -> None:
    x = hostile.normal(2, 3, 768, dtype=torch.float16, device=device)[..., :512]
    weight = hostile.normal(512, dtype=torch.float16, device=device, seed=1)
    with torch.profiler.profile() as profile:
        codes, scales = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=128)
    names = {event.name for event in profile.events()}
    assert "effllm::rms_norm_fp8_quantize" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}
    wanted = rms_norm_fp8_quantize(x.reshape(6, 512), weight, eps=EPS, group_size=128)
    assert codes.shape == (2, 3, 512)
    assert_same((codes.view(6, 512), scales.flatten(0, -2)), wanted)
    assert scales.flatten(0, -2).stride() == wanted[1].stride()


def test_rows_do_not_depend_on_others_or_on_threads() -> None:
    x, weight = hostile.normal(300, 700), hostile.normal(700, seed=1)
    codes, scales = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=128)
    assert_same(
        rms_norm_fp8_quantize(x[77:78], weight, eps=EPS, group_size=128),
        (codes[77:78], scales[77:78]),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        found = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=128)
    finally:
        torch.set_num_threads(threads)
    assert_same(found, (codes, scales))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 700)),
    group_size=st.sampled_from([None, 128]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 30),
    eps=st.sampled_from([0.0, 1e-6, 1e-5, 0.1]),
)
def test_any_size_and_magnitude_equals_the_reference(
    shape: tuple[int, int], group_size: int | None, dtype: torch.dtype, exponent: int, eps: float
) -> None:
    x = (hostile.normal(*shape) * 2.0**exponent).to(dtype)
    weight = hostile.normal(shape[1], dtype=dtype, seed=1)
    options: dict[str, Any] = {"eps": eps, "group_size": group_size}
    found = rms_norm_fp8_quantize(x, weight, **options)
    assert_same(found, rms_norm_fp8_quantize_ref(x, weight, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: RmsNormFp8QuantizeCase) -> None:
    args, options = case.make("cpu")
    codes, scales = rms_norm_fp8_quantize(*(arg.cuda() for arg in args), **options)
    assert_same((codes.cpu(), scales.cpu()), rms_norm_fp8_quantize(*args, **options))


@pytest.mark.gpu
@every_group
def test_captured_as_the_very_first_call(group_size: int | None) -> None:
    x = hostile.normal(5, 384, dtype=torch.bfloat16, device="cuda")
    weight = hostile.normal(384, dtype=torch.bfloat16, device="cuda", seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=group_size)
    x.copy_(hostile.normal(5, 384, seed=7))
    graph.replay()
    assert_same(found, rms_norm_fp8_quantize(x, weight, eps=EPS, group_size=group_size))


X, W = torch.ones(4, 128), torch.ones(128)
ERRORS: list[tuple[Any, ...]] = [
    (X.int(), W, None, EPS, None, "x must be float16, bfloat16 or float32, got int32"),
    (X.half(), W, None, EPS, None, "weight must be float16, got float32"),
    (X, W[:64], None, EPS, None, r"weight must be \[K\] = \[128\], got \[64\]"),
    (X, X, None, EPS, None, r"weight must be \[K\] = \[128\], got \[4, 128\]"),
    (X, W, None, -1e-6, None, "eps must be finite and at least 0, got -0.000001"),
    (X, W, None, NAN, None, "eps must be finite and at least 0, got nan"),
    (X, W, None, EPS, 64, "group_size must be 128, or None for one scale per row, got 64"),
    (X, W, W[:1], EPS, 128, "group_size must be None with a scale of all rows, got 128"),
    (X, W, W[:2], EPS, None, r"scale must have one element, got \[2\]"),
    (X, W, W[:1].int(), EPS, None, "scale must be float16, bfloat16 or float32, got int32"),
    (X[0, 0], W, None, EPS, None, r"x must be \[\.\.\., K\], got a scalar"),
]


@pytest.mark.parametrize(("x", "weight", "scale", "eps", "group_size", "message"), ERRORS)
def test_errors(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    group_size: int | None,
    message: str,
    device: str,
) -> None:
    scale = None if scale is None else scale.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::rms_norm_fp8_quantize: {message}"):
        rms_norm_fp8_quantize(
            x.to(device), weight.to(device), scale, eps=eps, group_size=group_size
        )


def test_weight_must_be_contiguous(device: str) -> None:
    weight = torch.ones(256, device=device)[::2]
    message = r"weight must have stride 1 in its last dimension, got strides \[2\]"
    with pytest.raises(RuntimeError, match=f"effllm::rms_norm_fp8_quantize: {message}"):
        rms_norm_fp8_quantize(X.to(device), weight, eps=EPS)
