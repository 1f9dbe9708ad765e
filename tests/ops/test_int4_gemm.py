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


@pytest.mark.parametrize("m", [4, 40])
def test_long_sums_of_outliers_around_a_mean(m: int, device: str) -> None:
    """K = 16384, x with a mean and some channels a hundred times the others."""
    case = Int4GemmCase(m, 64, 16384, 128, torch.bfloat16, zeros=True)
    (x, *weights), kwargs = case.make(device)
    x += 1
    x[:, ::997] *= 100
    check(case, (x, *weights), kwargs)


def test_dequantize_is_what_the_op_multiplies_by() -> None:
    (_, qweight, scales, zeros, _), kwargs = CASE.make("cpu")
    eye = torch.eye(192, dtype=torch.float64)
    expected = int4_gemm_ref(eye, qweight, scales, zeros, **kwargs).T
    found = dequantize(qweight, scales, zeros, 192, kwargs["group_size"])
    assert_close_to_reference(found, expected, expected)


PERMUTED = replace(CASE, perm=True)


@pytest.mark.parametrize(("m", "k"), [(5, 2112), (20, 2112), (3, 200)])
def test_permuted_columns_are_a_permuted_x_to_the_bit(m: int, k: int, device: str) -> None:
    case = replace(PERMUTED, m=m, k=k)
    (x, *weights, perm), kwargs = case.make(device)
    expected = int4_gemm(x[..., perm.long()], *weights, **kwargs)
    assert_equal(int4_gemm(x, *weights, perm, **kwargs), expected)
    wide = hostile.normal(m, 2 * k, dtype=x.dtype, seed=3).to(device)[:, ::2]
    expected = int4_gemm(wide[..., perm.long()], *weights, **kwargs)
    assert_equal(int4_gemm(wide, *weights, perm, **kwargs), expected)


def test_gradient_through_permuted_columns(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    (x, *weights, perm), kwargs = replace(PERMUTED, dtype=dtype).make(device)
    eye = torch.eye(192, dtype=torch.float64, device=device)
    weight = int4_gemm_ref(eye, *weights[:3], None, perm, **kwargs).T
    grad = torch.randn(6, 72, device=device, dtype=dtype)
    int4_gemm(x.requires_grad_(), *weights, perm, **kwargs).backward(grad)
    assert_close_to_reference(x.grad, grad.double() @ weight, grad @ weight.to(dtype))


@pytest.mark.parametrize("entry", [-1, 192, 2**31 - 1])
@pytest.mark.parametrize("m", [3, 20])
def test_entries_of_perm_out_of_range(m: int, entry: int, device: str) -> None:
    """The CPU raises; the GPU, which cannot, reads the nearest column there is."""
    (x, *weights, perm), kwargs = replace(PERMUTED, m=m).make(device)
    perm[17] = entry
    if device == "cpu":
        with pytest.raises(
            RuntimeError, match=f"perm must be a permutation of 0 .. K - 1 = 191, got {entry} at 17"
        ):
            int4_gemm(x, *weights, perm, **kwargs)
    else:
        expected = int4_gemm(x, *weights, perm.clamp(0, 191), **kwargs)
        assert_equal(int4_gemm(x, *weights, perm, **kwargs), expected)


def wrong(index: int, tensor: Tensor) -> list[Any]:
    args = list(PERMUTED.make("cpu")[0])
    args[index] = tensor
    return args


ERRORS = [
    (
        wrong(0, torch.ones(6, 193).half()),
        r"scales must be \[N, ceil\(K/g\)\] = \[72, 4\], got \[72, 3\]",
    ),
    (
        wrong(0, torch.ones(6, 64).half()),
        r"scales must be \[N, ceil\(K/g\)\] = \[72, 1\], got \[72, 3\]",
    ),
    (wrong(3, torch.ones(72, 3)), r"zeros must be uint8, got float32"),
    (
        wrong(3, torch.ones(72, 2, dtype=torch.uint8)),
        r"zeros must be .* = \[72, 3\], got \[72, 2\]",
    ),
    (wrong(5, torch.arange(192)), r"perm must be int32, got int64"),
    (wrong(5, torch.arange(191).int()), r"perm must be \[K\] = \[192\], got \[191\]"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: list[Any], message: str, device: str) -> None:
    moved = [arg.to(device) for arg in args]
    with pytest.raises(RuntimeError, match=f"effllm::int4_gemm: {message}"):
        int4_gemm(*moved, group_size=64)


def test_perm_must_be_dense(device: str) -> None:
    (*args, perm), kwargs = PERMUTED.make(device)
    with pytest.raises(RuntimeError, match=r"perm must have stride 1 .* got strides \[2\]"):
        int4_gemm(*args, torch.stack([perm, perm], 1)[:, 0], **kwargs)


def test_bool_is_not_a_bias() -> None:
    (x, qweight, scales, zeros, _), kwargs = CASE.make("cpu")
    with pytest.raises(RuntimeError, match="bias"):
        int4_gemm(x, qweight, scales, zeros, True, **kwargs)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "group_size"), [(3, 64), (3, 128), (20, 64), (70, 64)])
def test_many_rows(m: int, group_size: int) -> None:
    case = Int4GemmCase(m, 59136, 2880, group_size)
    check(case, *case.make("cuda"))
