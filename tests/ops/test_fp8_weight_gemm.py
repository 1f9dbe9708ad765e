"""fp8_weight_gemm beyond the cases of the contract: every code, layouts, special values, gradients,
errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import fp8_weight_gemm
from effllm.ops.fp8_gemm import dequantize_weight
from effllm.testing import hostile
from effllm.testing.cases.fp8_weight_gemm import CPU_CASES, Fp8WeightGemmCase
from effllm.testing.compare import assert_close_to_reference, assert_equal

HALF, BF16, FP32, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
CASE = Fp8WeightGemmCase(6, 200, 320, "block", HALF, bias=True)


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_cases_of_the_cpu_alone(case: Fp8WeightGemmCase) -> None:
    args, _ = case.make("cpu")
    found = fp8_weight_gemm(*args)
    assert_close_to_reference(found, case.reference(*args), case.baseline(*args), cosine=True)


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (9, 1), (40, 1), (40, 8), (200, 72)])
def test_every_code_is_exact(m: int, k: int, dtype: torch.dtype, device: str) -> None:
    """One product per output, with powers of two: nothing is rounded."""
    weight = torch.zeros(256, k, dtype=torch.uint8, device=device)
    weight[:, k // 2] = torch.arange(256)
    weight = weight.view(E4M3)
    x = torch.zeros(m, k, dtype=dtype, device=device)
    x[:, k // 2] = 2.0 ** (torch.arange(m) % 6 - 3)
    out = fp8_weight_gemm(x, weight, torch.ones(1, device=device))
    assert out.isnan().sum() == 2 * m
    assert_equal(out, (x.double() @ weight.double().T).to(dtype))


def test_leading_dimensions_and_strides(device: str) -> None:
    (x, weight, w_scales, bias), _ = CASE.make(device)
    expected = fp8_weight_gemm(x, weight, w_scales, bias)
    cubic = fp8_weight_gemm(x.view(2, 3, 320), weight, w_scales, bias)
    assert_equal(cubic, expected.view(2, 3, 200))
    assert_equal(fp8_weight_gemm(x[0], weight, w_scales, bias), expected[0])
    for position, tensor in ((0, x), (2, w_scales), (3, bias)):
        for name, view in hostile.odd_strides(tensor):
            args = [x, weight, w_scales, bias]
            args[position] = view
            found = fp8_weight_gemm(*args)
            args[position] = view.contiguous()
            assert_equal(found, fp8_weight_gemm(*args), name=f"argument {position} {name}")


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
@pytest.mark.parametrize("gap", [0, 1, 4, 16])
def test_weights_anywhere_in_memory(offset: int, gap: int, device: str) -> None:
    for m, k in ((3, 320), (20, 136), (70, 77)):
        (x, weight, w_scales, _), _ = Fp8WeightGemmCase(m, 70, k).make(device)
        memory = torch.full((offset + 70 * (k + gap),), 0x7F, dtype=torch.uint8, device=device)
        view = memory[offset:].view(70, k + gap)[:, :k]
        view.copy_(weight.view(torch.uint8))
        expected = fp8_weight_gemm(x, weight, w_scales)
        assert_equal(fp8_weight_gemm(x, view.view(E4M3), w_scales), expected)


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("m", [40, 200])
def test_rows_apart_and_a_bias_of_another_type(m: int, dtype: torch.dtype, device: str) -> None:
    """As Hopper's kernel for many tokens takes them: x and weights in rows of whole 16 bytes."""
    case = Fp8WeightGemmCase(m, 200, 272, "block", dtype)
    (x, weight, w_scales, _), _ = case.make(device)
    memory = torch.full((200, 288), 0x7F, dtype=torch.uint8, device=device)
    view = memory[:, :272].copy_(weight.view(torch.uint8)).view(E4M3)
    scales = w_scales.to(HALF).T.contiguous().T
    bias = hostile.normal(200, seed=9).to(device)
    found = fp8_weight_gemm(x, view, scales, bias)
    assert_equal(found, fp8_weight_gemm(x, weight, scales.contiguous(), bias))
    baseline = case.baseline(x, weight, scales, None) + bias
    assert_close_to_reference(found, case.reference(x, weight, scales, bias), baseline)


@pytest.mark.parametrize(("m", "n", "k"), [(11, 300, 270), (11, 300, 272), (70, 304, 272)])
def test_special_values_reach_their_outputs_alone(m: int, n: int, k: int, device: str) -> None:
    (x, weight, w_scales, _), _ = Fp8WeightGemmCase(m, n, k, "block").make(device)
    expected = fp8_weight_gemm(x, weight, w_scales)
    weight.view(torch.uint8)[17, k - 1] = 0x7F
    w_scales[1, 2] = math.nan
    x[4, 3] = math.nan
    found = fp8_weight_gemm(x, weight, w_scales)
    expected[4] = expected[:, 17] = expected[:, 128:256] = math.nan
    assert_equal(found, expected)


@pytest.mark.parametrize("per", ["tensor", "row", "block"])
def test_gradients_are_the_dense_ones(per: str, device: str) -> None:
    dtype = FP32 if device == "cpu" else BF16
    (x, weight, w_scales, bias), _ = replace(CASE, per=per, dtype=dtype).make(device)
    grad = torch.randn(6, 200, device=device, dtype=dtype)
    results = []
    for wide in (torch.float64, dtype):
        dense = dequantize_weight(weight, w_scales, wide)
        inputs = [t.to(wide).requires_grad_() for t in (x.clone(), bias.clone())]
        torch.nn.functional.linear(inputs[0], dense, inputs[1]).backward(grad.to(wide))
        results.append([t.grad for t in inputs])
    ours = [t.clone().requires_grad_() for t in (x, bias)]
    fp8_weight_gemm(ours[0], weight, w_scales, ours[1]).backward(grad)
    for found, wanted, baseline in zip(ours, *results, strict=True):
        assert_close_to_reference(found.grad, wanted, baseline)


def test_quantised_tensors_refuse_gradients(device: str) -> None:
    (x, weight, w_scales, bias), _ = CASE.make(device)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="w_scales must not require a gradient"):
        fp8_weight_gemm(x, weight, w_scales.requires_grad_(), bias)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [0, 1, 20, 300])
def test_captured_as_the_very_first_call_and_repeatable(m: int) -> None:
    (x, weight, w_scales, _), _ = Fp8WeightGemmCase(m, 520, 1368, "block").make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_weight_gemm(x, weight, w_scales)
    x.copy_(hostile.normal(m, 1368, dtype=x.dtype, seed=5))
    for _ in range(100):
        graph.replay()
        assert_equal(out, fp8_weight_gemm(x, weight, w_scales))


ERRORS: list[tuple[int, Tensor, str]] = [
    (0, torch.ones(6, 320).to(E4M3), "x must be float16.*, got float8_e4m3fn"),
    (0, torch.ones(6, 319).half(), r"weight must be \[N, K\] = \[200, 319\], got \[200, 320\]"),
    (0, torch.ones(()).half(), r"x must be \[\.\.\., K\], got a scalar"),
    (1, torch.ones(200, 320).half(), "weight must be float8_e4m3fn, got float16"),
    (1, torch.ones(320, 200).to(E4M3).T, "weight must have stride 1 in its last dimension"),
    (2, torch.ones(200), r"w_scales must have one element, .*, got \[200\]"),
    (2, torch.ones(2, 3, dtype=torch.int8), "w_scales must be float16.*, got int8"),
    (3, torch.ones(199), r"bias must be \[N\] = \[200\], got \[199\]"),
]


@pytest.mark.parametrize(("index", "wrong", "message"), ERRORS)
def test_errors(index: int, wrong: Tensor, message: str, device: str) -> None:
    args: list[Any] = list(CASE.make(device)[0])
    args[index] = wrong.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::fp8_weight_gemm: {message}"):
        fp8_weight_gemm(*args)
