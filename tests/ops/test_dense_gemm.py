"""dense_gemm beyond the cases of the contract: layouts, gradients, graphs, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from effllm.ops import dense_gemm
from effllm.ops.dense_gemm import dense_gemm_ref
from effllm.testing import hostile
from effllm.testing.cases.dense_gemm import CPU_CASES, DenseGemmCase
from effllm.testing.compare import assert_close_to_reference, assert_equal

CASE = DenseGemmCase(6, 72, 192, torch.float16, bias=True)


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_cases_of_the_cpu_alone(case: DenseGemmCase) -> None:
    args, _ = case.make("cpu")
    found = dense_gemm(*args)
    assert_close_to_reference(found, case.reference(*args), case.baseline(*args), cosine=True)


def test_leading_dimensions_and_strides(device: str) -> None:
    (x, weight, bias), _ = CASE.make(device)
    expected = dense_gemm(x, weight, bias)
    assert_equal(dense_gemm(x.view(2, 3, 192), weight, bias), expected.view(2, 3, 72))
    assert_equal(dense_gemm(x[0], weight, bias), expected[0])
    for name, tensor in hostile.odd_strides(x):
        found = dense_gemm(tensor, weight, bias)
        assert_equal(found, dense_gemm(tensor.contiguous(), weight, bias), name=name)
    for name, tensor in hostile.odd_strides(bias):
        found = dense_gemm(x, weight, tensor)
        assert_equal(found, dense_gemm(x, weight, tensor.contiguous()), name=name)
    wide = torch.full((72, 256), float("nan"), dtype=weight.dtype, device=device)
    wide[:, 32:224] = weight
    assert_equal(dense_gemm(x, wide[:, 32:224], bias), expected)


def test_gradients_are_the_dense_ones(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    args, _ = replace(CASE, dtype=dtype).make(device)
    grad = torch.randn(6, 72, device=device, dtype=dtype)
    exact = [arg.double().requires_grad_() for arg in args]
    dense_gemm_ref(*exact).backward(grad.double())
    plain = [arg.clone().requires_grad_() for arg in args]
    torch.nn.functional.linear(*plain).backward(grad)
    ours = [arg.clone().requires_grad_() for arg in args]
    dense_gemm(*ours).backward(grad)
    for found, wanted, baseline in zip(ours, exact, plain, strict=True):
        assert_close_to_reference(found.grad, wanted.grad, baseline.grad)


ERRORS = [
    (0, torch.ones(6, 191).half(), r"weight must be \[N, K\] = \[72, 191\], got \[72, 192\]"),
    (0, torch.ones(()).half(), r"x must be \[\.\.\., K\], got a scalar"),
    (1, torch.ones(72, 192), r"weight must be float16, got float32"),
    (1, torch.ones(192).half(), r"weight must be \[N, K\] = .*, got \[192\]"),
    (1, torch.ones(192, 72).half().T, r"weight must have stride 1 in its last dimension"),
    (2, torch.ones(71), r"bias must be \[N\] = \[72\], got \[71\]"),
    (2, torch.ones(72, dtype=torch.int32), r"bias must be float16.*, got int32"),
]


@pytest.mark.parametrize(("index", "wrong", "message"), ERRORS)
def test_errors(index: int, wrong: torch.Tensor, message: str, device: str) -> None:
    args = list(CASE.make(device)[0])
    args[index] = wrong.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::dense_gemm: {message}"):
        dense_gemm(*args)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(72, 190), (70, 192)])
def test_sizes_that_tma_cannot_read_are_a_named_error(n: int, k: int) -> None:
    args, _ = DenseGemmCase(6, n, k).make("cuda")
    message = rf"weight must be \[N, K\] with multiples of 8 on a GPU, got \[{n}, {k}\]"
    with pytest.raises(RuntimeError, match=message):
        dense_gemm(*args)


@pytest.mark.gpu
def test_rows_that_tma_cannot_read_are_a_named_error() -> None:
    (x, _, bias), _ = CASE.make("cuda")
    for cols, first in ((200, 4), (196, 0)):  # an address, and a stride, of 8 bytes
        wide = torch.zeros(72, cols, dtype=x.dtype, device="cuda")
        with pytest.raises(
            RuntimeError, match="weight must have rows that start at multiples of 16"
        ):
            dense_gemm(x, wide[:, first : first + 192], bias)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [0, 1, 300])
def test_captured_as_the_very_first_call_and_repeatable(m: int) -> None:
    (x, weight, _), _ = DenseGemmCase(m, 520, 1032).make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dense_gemm(x, weight)
    x.copy_(hostile.normal(m, 1032, dtype=x.dtype, seed=5))
    for _ in range(100):
        graph.replay()
        assert_equal(out, dense_gemm(x, weight))
