"""int4_gemm beyond the cases of the contract: layouts, gradients, special values, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int4_gemm, int4_pack
from effllm.ops.int4_gemm import dequantize, int4_gemm_ref
from effllm.testing import hostile
from effllm.testing.cases.int4_gemm import CPU_CASES, Int4GemmCase, Int4PackBaselineCase
from effllm.testing.compare import assert_close_to_reference, assert_equal

CASE = Int4GemmCase(6, 72, 192, 64, torch.float16, zeros=True, bias=True)
OFF_EVERY_TILE = [(n, k) for n in (1, 8, 12, 40) for k in (2880, 4304, 7392, 10944)]
"""N and K of real models' narrow and long layers."""


def check(case: Int4GemmCase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert_close_to_reference(
        int4_gemm(*args, **kwargs),
        case.reference(*args, **kwargs),
        case.baseline(*args, **kwargs),
        cosine=True,
    )


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_cases_of_the_cpu_alone(case: Int4GemmCase) -> None:
    check(case, *case.make("cpu"))


@pytest.mark.parametrize("zeros", [False, True])
def test_the_baseline_of_torch_solves_the_same_problem(zeros: bool) -> None:
    case = Int4PackBaselineCase(5, 64, 256, 64, zeros=zeros, bias=True, max_zero=15)
    args, kwargs = case.make("cpu")
    plain = Int4GemmCase.prepare_baseline(case, *args, **kwargs)()
    exact = case.reference(*args, **kwargs)
    assert_close_to_reference(case.baseline(*args, **kwargs), exact, plain, cosine=True)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, -1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    options=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype, options: tuple[bool, bool]
) -> None:
    case = Int4GemmCase(m, n, k, group_size, dtype, *options)
    check(case, *case.make("cpu"))


@pytest.mark.parametrize(("n", "k"), OFF_EVERY_TILE)
@pytest.mark.parametrize("m", [3, 70])
def test_shapes_off_every_tile(m: int, n: int, k: int, device: str) -> None:
    case = Int4GemmCase(m, n, k, 128, torch.bfloat16, zeros=True, bias=True)
    check(case, *case.make(device))


@pytest.mark.parametrize(("n", "k"), OFF_EVERY_TILE)
def test_every_type_off_every_tile_with_strided_x(n: int, k: int) -> None:
    """The loops of the CPU, for every group size and type of scale."""
    floats = [torch.bfloat16, torch.float16, torch.float32]
    for index, (m, group_size) in enumerate(zip([3, 7, 17, 33], [32, 64, 128, -1], strict=True)):
        scales_dtype = floats[(index + n) % 3]
        for dtype, zeros, max_zero in (
            (torch.bfloat16, False, 0),
            (torch.bfloat16, True, 15),
            (torch.bfloat16, True, 255),
            (torch.float16, True, 15),
            (torch.float32, False, 0),
        ):
            case = Int4GemmCase(m, n, k, group_size, dtype, zeros, True, scales_dtype, max_zero)
            (_, *weights), kwargs = case.make("cpu")
            wide = hostile.normal(m, 2 * k, dtype=dtype, seed=index)
            check(case, (wide[:, ::2], *weights), kwargs)


@pytest.mark.parametrize("m", [1, 3, 4, 64])
@pytest.mark.parametrize("first_zero", [0, 1, 64, 128, 192])
def test_every_code_and_zero_point_is_exact(m: int, first_zero: int, device: str) -> None:
    """One column at a time: q - z is at most eight bits, which even the output holds exactly."""
    zeros = torch.arange(first_zero, first_zero + 16, dtype=torch.uint8).repeat(4)[:, None]
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).repeat(64, 1)
    scales = torch.full((64, 1), 0.25, dtype=torch.bfloat16)
    x = torch.eye(64, dtype=torch.bfloat16)[64 - m :]
    moved = [t.to(device) for t in (x, int4_pack(codes), scales, zeros)]
    expected = (codes.double() - zeros.double())[:, 64 - m :].T * 0.25
    assert_equal(int4_gemm(*moved, group_size=64), expected.to(torch.bfloat16).to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("max_zero", [None, 16, 255])
def test_a_token_does_not_depend_on_its_batch_on_the_cpu(
    dtype: torch.dtype, group_size: int, max_zero: int | None
) -> None:
    """The same bits alone, beside few tokens and in any position of many."""
    case = Int4GemmCase(70, 72, 1000, group_size, dtype, max_zero is not None)
    if max_zero is not None:
        case = replace(case, max_zero=max_zero)
    (x, *weights), kwargs = case.make("cpu")
    whole = int4_gemm(x, *weights, **kwargs)
    for size in (1, 2, 3, 4, 5, 7, 17, 33, 64):
        for first in (0, 70 - size):
            part = slice(first, first + size)
            assert_equal(int4_gemm(x[part], *weights, **kwargs), whole[part], name=f"{part}")


def test_leading_dimensions_of_x(device: str) -> None:
    (x, *weights), kwargs = CASE.make(device)
    expected = int4_gemm(x, *weights, **kwargs)
    assert_equal(int4_gemm(x.view(2, 3, 192), *weights, **kwargs), expected.view(2, 3, 72))
    assert_equal(int4_gemm(x[0], *weights, **kwargs), expected[0])
    assert int4_gemm(x.view(1, 6, 192)[:, :0], *weights, **kwargs).shape == (1, 0, 72)


@pytest.mark.parametrize("index", [0, 2, 3, 4], ids=["x", "scales", "zeros", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_strides(index: int, dtype: torch.dtype, device: str) -> None:
    args, kwargs = replace(CASE, dtype=dtype).make(device)
    for name, tensor in hostile.odd_strides(args[index]):
        strided, dense = list(args), list(args)
        strided[index], dense[index] = tensor, tensor.contiguous()
        result = int4_gemm(*strided, **kwargs)
        assert_equal(result, int4_gemm(*dense, **kwargs), name=name)


def test_slices_along_k_add_up(device: str) -> None:
    """Row-parallel sharding: two strided slices of one packed weight, each with its scales."""
    case = Int4GemmCase(4, 64, 256, 64, torch.bfloat16)
    (x, qweight, scales, _, _), kwargs = case.make(device)
    halves = [
        int4_gemm(
            x[:, 128 * i : 128 * (i + 1)].float().to(x.dtype),
            qweight[:, 1024 * i : 1024 * (i + 1)],
            scales[:, 2 * i : 2 * (i + 1)],
            **kwargs,
        ).double()
        for i in range(2)
    ]
    whole = int4_gemm_ref(x, qweight, scales, **kwargs)
    baseline = case.baseline(x, qweight, scales, None, None, **kwargs)
    assert_close_to_reference(sum(halves, torch.zeros(())), whole, baseline, dtype=x.dtype)


def test_bias_is_added_once_and_exactly(device: str) -> None:
    (x, qweight, scales, zeros, bias), kwargs = CASE.make(device)
    out = int4_gemm(torch.zeros_like(x), qweight, scales, zeros, bias, **kwargs)
    assert_equal(out, bias.expand_as(out).contiguous())


def test_large_values_neither_overflow_inside_nor_are_hidden(device: str) -> None:
    """Partial sums go beyond fp16's 65504 and come back; what stays beyond is inf."""
    case = Int4GemmCase(2, 64, 128, 64, torch.float16)
    (x, qweight, scales, _, _), kwargs = case.make(device)
    x[0] = 60000.0
    x[0, 64:] = -60000.0
    args = (x, qweight, scales, None, None)
    check(case, args, kwargs)
    x[1] = 60000.0
    assert int4_gemm(*args, **kwargs)[1].isinf().any()


@pytest.mark.parametrize("m", [4, 40])
def test_long_sums_of_outliers_around_a_mean(m: int, device: str) -> None:
    """K = 16384, x with a mean and some channels a hundred times the others."""
    case = Int4GemmCase(m, 64, 16384, 128, torch.bfloat16, zeros=True)
    (x, *weights), kwargs = case.make(device)
    x += 1
    x[:, ::997] *= 100
    check(case, (x, *weights), kwargs)


@pytest.mark.parametrize("m", [4, 9])
def test_nan_and_inf_of_one_token_stay_in_its_row(m: int, device: str) -> None:
    (x, *weights), kwargs = Int4GemmCase(m, 64, 64).make(device)
    clean = int4_gemm(x, *weights, **kwargs)
    x[3] = float("nan")
    out = int4_gemm(x, *weights, **kwargs)
    assert out[3].isnan().all()
    others = [row for row in range(m) if row != 3]
    assert_equal(out[others], clean[others])


@pytest.mark.parametrize("case", [Int4GemmCase(16, 128, 1024), Int4GemmCase(100, 520, 2048)])
def test_repeatable_to_the_bit(case: Int4GemmCase, device: str) -> None:
    args, kwargs = case.make(device)
    first = int4_gemm(*args, **kwargs)
    for _ in range(100 if device == "cuda" else 5):
        assert_equal(int4_gemm(*args, **kwargs), first)


@pytest.mark.parametrize("zeros", [False, True])
def test_gradient_of_x_and_bias_is_the_dense_one(zeros: bool, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = Int4GemmCase(5, 72, 200, 64, dtype, zeros, bias=True)
    (x, qweight, scales, zero_points, bias), kwargs = case.make(device)
    weight = int4_gemm_ref(
        torch.eye(200, dtype=torch.float64, device=device), qweight, scales, zero_points, **kwargs
    ).T
    x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(5, 72, device=device, dtype=dtype)
    int4_gemm(x, qweight, scales, zero_points, bias, **kwargs).backward(grad)
    assert_close_to_reference(x.grad, grad.double() @ weight, grad @ weight.to(dtype))
    assert_close_to_reference(bias.grad, grad.double().sum(0), grad.sum(0))
    # The gradient of .sum() is an expanded scalar, with strides 0.
    x.grad = None
    int4_gemm(x, qweight, scales, zero_points, bias, **kwargs).sum().backward()
    ones = torch.ones_like(grad)
    assert_close_to_reference(x.grad, ones.double() @ weight, ones @ weight.to(dtype))


def test_gradient_of_scales_is_refused(device: str) -> None:
    (x, qweight, scales, zeros, bias), kwargs = CASE.make(device)
    with pytest.raises(RuntimeError, match="int4_gemm: scales must not require a gradient"):
        int4_gemm(x, qweight, scales.requires_grad_(), zeros, bias, **kwargs)


def test_dequantize_is_what_the_op_multiplies_by() -> None:
    (_, qweight, scales, zeros, _), kwargs = CASE.make("cpu")
    eye = torch.eye(192, dtype=torch.float64)
    expected = int4_gemm_ref(eye, qweight, scales, zeros, **kwargs).T
    found = dequantize(qweight, scales, zeros, 192, kwargs["group_size"])
    assert_close_to_reference(found, expected, expected)


def wrong(index: int, tensor: Tensor) -> list[Any]:
    args = list(CASE.make("cpu")[0])
    args[index] = tensor
    return args


ERRORS = [
    (wrong(0, torch.ones(6, 192, dtype=torch.int32)), r"x must be float16.* got int32"),
    (wrong(0, torch.ones(())), r"x must be \[\.\.\., K\], got a scalar"),
    (
        wrong(0, torch.ones(6, 193).half()),
        r"scales must be \[N, ceil\(K/g\)\] = \[72, 4\], got \[72, 3\]",
    ),
    (
        wrong(0, torch.ones(6, 64).half()),
        r"scales must be \[N, ceil\(K/g\)\] = \[72, 1\], got \[72, 3\]",
    ),
    (wrong(1, torch.zeros(2, 1536)), r"qweight must be int32, got float32"),
    (
        wrong(1, torch.zeros(1, 1536, dtype=torch.int32)),
        r"qweight must be \[ceil\(N/64\), ceil\(K/64\)\*512\] = \[2, 1536\], got \[1, 1536\]",
    ),
    (
        wrong(1, torch.zeros(1536, 2, dtype=torch.int32).T),
        r"qweight must have stride 1 in its last dimension, got strides \[1, 2\]",
    ),
    (
        wrong(1, torch.zeros(2 * 1536 + 1, dtype=torch.int32)[1:].view(2, 1536)),
        r"qweight must have rows that start at multiples of 16 bytes",
    ),
    (
        wrong(2, torch.ones(72, 3, dtype=torch.float64)),
        r"scales must be float16.*, got another dtype",
    ),
    (wrong(2, torch.ones(72, 4)), r"scales must be \[N, ceil\(K/g\)\] = \[72, 3\], got \[72, 4\]"),
    (wrong(2, torch.ones(72)), r"scales must be \[N, ceil\(K/g\)\] = .*, got \[72\]"),
    (wrong(3, torch.ones(72, 3)), r"zeros must be uint8, got float32"),
    (
        wrong(3, torch.ones(72, 2, dtype=torch.uint8)),
        r"zeros must be .* = \[72, 3\], got \[72, 2\]",
    ),
    (wrong(4, torch.ones(71)), r"bias must be \[N\] = \[72\], got \[71\]"),
    (wrong(4, torch.ones(72, dtype=torch.int32)), r"bias must be float16.*, got int32"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: list[Any], message: str, device: str) -> None:
    # `.to` makes its copies aligned and dense, which two of the cases are about.
    if device == "cuda" and "rows that start" in message:
        whole = torch.zeros(2 * 1536 + 1, dtype=torch.int32, device=device)
        args = [*args[:1], whole[1:].view(2, 1536), *args[2:]]
    moved = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
    with pytest.raises(RuntimeError, match=f"effllm::int4_gemm: {message}"):
        int4_gemm(*moved, group_size=64)


@pytest.mark.parametrize("group_size", [0, -1, 16, 96, 256])
def test_group_size_errors(group_size: int, device: str) -> None:
    args, _ = CASE.make(device)
    message = f"group_size must be 32, 64, 128 or K = 192, got {group_size}"
    with pytest.raises(RuntimeError, match=message):
        int4_gemm(*args, group_size=group_size)


def test_bool_is_not_a_bias() -> None:
    (x, qweight, scales, zeros, _), kwargs = CASE.make("cpu")
    with pytest.raises(RuntimeError, match="bias"):
        int4_gemm(x, qweight, scales, zeros, True, **kwargs)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_fp32_on_the_gpu_is_a_named_error() -> None:
    (x, *weights), kwargs = CASE.make("cuda")
    with pytest.raises(RuntimeError, match="x must be float16 or bfloat16, got float32"):
        int4_gemm(x.float(), *weights, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1, 2])
def test_mixed_devices_are_a_named_error(index: int) -> None:
    args, kwargs = CASE.make("cuda")
    moved = [arg.cpu() if i == index else arg for i, arg in enumerate(args)]
    with pytest.raises(RuntimeError, match=r"must be on (cpu|cuda:0) as x is, got (cpu|cuda:0)"):
        int4_gemm(*moved, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [333, 1024])
@pytest.mark.parametrize("m", [0, 1, 20, 200])
def test_captured_as_the_very_first_call_and_replayed_with_other_data(m: int, k: int) -> None:
    case = Int4GemmCase(m, 192, k, 64, torch.bfloat16)
    (x, *weights), kwargs = case.make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = int4_gemm(x, *weights, **kwargs)
    x.copy_(hostile.normal(m, k, dtype=x.dtype, seed=5))
    graph.replay()
    assert_equal(out, int4_gemm(x, *weights, **kwargs))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "group_size"), [(3, 64), (3, 128), (20, 64), (70, 64)])
def test_many_rows(m: int, group_size: int) -> None:
    case = Int4GemmCase(m, 59136, 2880, group_size)
    check(case, *case.make("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16, 40])
def test_launches_that_start_early_see_what_comes_before_them(m: int) -> None:
    """Each multiplies what the one before has written, by codes that were packed just before."""
    n = 2048
    codes = torch.randint(16, (n, n), dtype=torch.uint8, device="cuda")
    other = 15 - codes
    scales = torch.full((n, n // 128), 1 / 256, dtype=torch.bfloat16, device="cuda")
    first = hostile.normal(m, n, dtype=torch.bfloat16, seed=2).to("cuda")

    def chain(wait: bool) -> list[Tensor]:
        x, results = first.clone(), []
        for i in range(12):
            qweight = int4_pack(codes if i % 3 else other)
            for _ in range(3):
                if wait:
                    torch.cuda.synchronize()
                x = int4_gemm(x, qweight, scales, group_size=128)
                results.append(x)
            x = x / x.abs().max()
        return results

    expected = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain(wait=False)
    for _ in range(20):
        graph.replay()
        for results in (replayed, chain(wait=False)):
            for found, wanted in zip(results, expected, strict=True):
                assert_equal(found, wanted)


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    (x, *weights), kwargs = Int4GemmCase(8, 64, 64).make("cuda")
    expected = int4_gemm(x, *weights, **kwargs)
    source, late = x.clone(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(source)
        out = int4_gemm(late, *weights, **kwargs)
    torch.cuda.synchronize()
    assert_equal(out, expected)
