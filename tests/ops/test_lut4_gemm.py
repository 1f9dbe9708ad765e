"""lut4_gemm beyond the cases of the contract: layouts, padding, gradients, special values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int4_pack, lut4_gemm
from effllm.ops.lut4_gemm import decode
from effllm.testing.cases.lut4_gemm import CPU_CASES, Lut4GemmCase
from effllm.testing.compare import assert_close_to_reference, assert_equal

CODEBOOKS = ["tensor", "row", "group"]
CASE = Lut4GemmCase(6, 72, 192, 64, torch.float16, "group", bias=True)


def check(case: Lut4GemmCase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert_close_to_reference(
        lut4_gemm(*args, **kwargs),
        case.reference(*args, **kwargs),
        case.baseline(*args, **kwargs),
        cosine=True,
    )


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_fp32_on_the_cpu(case: Lut4GemmCase) -> None:
    check(case, *case.make("cpu"))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, -1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    codebook=st.sampled_from(CODEBOOKS),
    scales=st.booleans(),
)
def test_any_shape(
    m: int,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    codebook: str,
    scales: bool,
) -> None:
    case = Lut4GemmCase(m, n, k, group_size, dtype, codebook, scales, bias=True)
    check(case, *case.make("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codebook_is_rounded_to_the_dtype_of_x(dtype: torch.dtype, device: str) -> None:
    case = Lut4GemmCase(6, 72, 192, 64, dtype, "group", codebook_dtype=torch.float32)
    (x, qweight, codebook, scales, bias), kwargs = case.make(device)
    rounded = lut4_gemm(x, qweight, codebook.to(dtype), scales, bias, **kwargs)
    assert_equal(lut4_gemm(x, qweight, codebook, scales, bias, **kwargs), rounded)


def test_rows_come_from_the_first_argument_that_has_them(device: str) -> None:
    args, kwargs = Lut4GemmCase(6, 70, 128, 64, torch.float16, scales=True, bias=True).make(device)
    x, qweight, codebook, scales, bias = args
    ones = torch.ones_like(scales)
    expected = lut4_gemm(x, qweight, codebook.expand(70, 16), **kwargs)
    whole = lut4_gemm(x, qweight, codebook, **kwargs)
    assert whole.shape == (6, 128)
    assert_equal(whole[:, :70].contiguous(), expected)
    assert_equal(lut4_gemm(x, qweight, codebook, ones, **kwargs), expected)
    assert_equal(lut4_gemm(x, qweight, codebook, None, torch.zeros_like(bias), **kwargs), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"),
    [
        (1, 70, 1, 32),
        (3, 64, 100, 32),
        (5, 17, 63, 64),
        (40, 72, 160, 32),
        (70, 65, 200, -1),
        (7, 70, 2088, 64),
        (2, 70, 2200, 128),
    ],
)
def test_padding_is_never_looked_up(
    m: int, n: int, k: int, group_size: int, codebook: str, value: float, device: str
) -> None:
    """Codes in use are below 8, the padding's are 8 (as int4_pack leaves it) and above."""
    case = Lut4GemmCase(m, n, k, group_size, torch.float16, codebook, bias=True)
    (x, _, table, scales, bias), kwargs = case.make(device)
    codes = torch.randint(0, 8, (n, k), dtype=torch.uint8)
    noise = torch.randint(8, 16, (-(-n // 64) * 64, -(-k // 64) * 64), dtype=torch.uint8)
    noise[:n, :k] = codes
    table[..., 8:] = value
    clean = table.nan_to_num(0.0, 0.0, 0.0)
    for packed in (int4_pack(codes.to(device)), int4_pack(noise.to(device))):
        expected = lut4_gemm(x, packed, clean, scales, bias, **kwargs)
        assert expected.isfinite().all()
        assert_equal(lut4_gemm(x, packed, table, scales, bias, **kwargs), expected)


def test_special_entries_reach_the_outputs_that_use_them(device: str) -> None:
    case = Lut4GemmCase(6, 72, 200, 64, torch.float16, "row")
    (x, qweight, codebook, scales, bias), kwargs = case.make(device)
    codebook[3, 5], codebook[40, 2], codebook[71, 15] = float("inf"), float("nan"), 7e4
    check(case, (x, qweight, codebook, scales, bias), kwargs)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_is_what_the_op_multiplies_by(codebook: str) -> None:
    case = Lut4GemmCase(6, 72, 192, 64, torch.float32, codebook)
    (_, _, table, scales, _), kwargs = case.make("cpu")
    codes = torch.randint(0, 16, (72, 192), dtype=torch.uint8)
    expected = lut4_gemm(torch.eye(192), int4_pack(codes), table, scales, **kwargs).T
    assert_equal(decode(codes, table, scales, **kwargs), expected.contiguous())


def wrong(index: int, tensor: Tensor) -> list[Any]:
    args = list(CASE.make("cpu")[0])
    args[index] = tensor
    return args


SHAPES = r"\[16\], \[N, 16\] or \[N, ceil\(K/g\), 16\]"
ERRORS = [
    (
        wrong(0, torch.ones(6, 193).half()),
        rf"codebook must be {SHAPES} = \[16\], \[72, 16\] or \[72, 4, 16\], got \[72, 3, 16\]",
    ),
    (wrong(2, torch.ones(16, dtype=torch.float64)), r"codebook must be float16.*, got another"),
    (wrong(2, torch.ones(16, dtype=torch.uint8)), r"codebook must be float16.*, got uint8"),
    (wrong(2, torch.ones(())), rf"codebook must be {SHAPES} = .*, got \[\]"),
    (wrong(2, torch.ones(15)), rf"codebook must be {SHAPES} = .*, got \[15\]"),
    (wrong(2, torch.ones(72, 17)), rf"codebook must be {SHAPES} = .*, got \[72, 17\]"),
    (wrong(2, torch.ones(72, 2, 16)), rf"codebook must be {SHAPES} = .*, got \[72, 2, 16\]"),
    (wrong(2, torch.ones(1, 72, 3, 16)), rf"codebook must be {SHAPES} = .*, got \[1, 72, 3, 16\]"),
    (
        wrong(2, torch.ones(71, 16)),
        r"scales must be \[N, ceil\(K/g\)\] = \[71, 3\], got \[72, 3\]",
    ),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: list[Any], message: str, device: str) -> None:
    moved = [arg.to(device) for arg in args]
    with pytest.raises(RuntimeError, match=f"effllm::lut4_gemm: {message}"):
        lut4_gemm(*moved, group_size=64)
