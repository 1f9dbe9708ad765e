"""lut4_gemm beyond the cases of the contract: layouts, padding, gradients, special values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int4_pack, lut4_gemm
from effllm.ops.lut4_gemm import decode, lut4_gemm_ref
from effllm.testing import hostile
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


def test_leading_dimensions_of_x(device: str) -> None:
    (x, *weights), kwargs = CASE.make(device)
    expected = lut4_gemm(x, *weights, **kwargs)
    assert_equal(lut4_gemm(x.view(2, 3, 192), *weights, **kwargs), expected.view(2, 3, 72))
    assert_equal(lut4_gemm(x[0], *weights, **kwargs), expected[0])
    assert lut4_gemm(x.view(1, 6, 192)[:, :0], *weights, **kwargs).shape == (1, 0, 72)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("index", [0, 2, 3, 4], ids=["x", "codebook", "scales", "bias"])
def test_any_strides(index: int, codebook: str, device: str) -> None:
    args, kwargs = Lut4GemmCase(6, 72, 192, 64, torch.float16, codebook, bias=True).make(device)
    for name, tensor in hostile.odd_strides(args[index]):
        strided, dense = list(args), list(args)
        strided[index], dense[index] = tensor, tensor.contiguous()
        result = lut4_gemm(*strided, **kwargs)
        assert_equal(result, lut4_gemm(*dense, **kwargs), name=name)


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
    [(1, 70, 1, 32), (3, 64, 100, 32), (5, 17, 63, 64), (40, 72, 160, 32), (70, 65, 200, -1)],
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


def test_slices_along_k_add_up(device: str) -> None:
    """Row-parallel sharding: two strided slices of one packed weight, each with its tables."""
    case = Lut4GemmCase(4, 64, 256, 64, torch.bfloat16, "group")
    (x, qweight, codebook, scales, _), kwargs = case.make(device)
    halves = [
        lut4_gemm(
            x[:, 128 * i : 128 * (i + 1)],
            qweight[:, 1024 * i : 1024 * (i + 1)],
            codebook[:, 2 * i : 2 * (i + 1)],
            scales[:, 2 * i : 2 * (i + 1)],
            **kwargs,
        ).double()
        for i in range(2)
    ]
    whole = lut4_gemm_ref(x, qweight, codebook, scales, **kwargs)
    baseline = case.baseline(x, qweight, codebook, scales, None, **kwargs)
    assert_close_to_reference(sum(halves, torch.zeros(())), whole, baseline, dtype=x.dtype)


def test_bias_is_added_once_and_exactly(device: str) -> None:
    (x, qweight, codebook, scales, bias), kwargs = CASE.make(device)
    out = lut4_gemm(torch.zeros_like(x), qweight, codebook, scales, bias, **kwargs)
    assert_equal(out, bias.expand_as(out).contiguous())


def test_large_values_neither_overflow_inside_nor_are_hidden(device: str) -> None:
    """Partial sums go beyond fp16's 65504 and come back; what stays beyond is inf."""
    case = Lut4GemmCase(2, 64, 128, 64, torch.float16, scales=False)
    (x, qweight, codebook, _, _), kwargs = case.make(device)
    x[0] = 60000.0
    x[0, 64:] = -60000.0
    args = (x, qweight, codebook, None, None)
    check(case, args, kwargs)
    x[1] = 60000.0
    assert lut4_gemm(*args, **kwargs)[1].isinf().any()


def test_nan_of_one_token_stays_in_its_row(device: str) -> None:
    (x, *weights), kwargs = Lut4GemmCase(9, 64, 64).make(device)
    clean = lut4_gemm(x, *weights, **kwargs)
    x[3] = float("nan")
    out = lut4_gemm(x, *weights, **kwargs)
    assert out[3].isnan().all()
    others = [row for row in range(9) if row != 3]
    assert_equal(out[others], clean[others])


def test_repeatable_to_the_bit(device: str) -> None:
    args, kwargs = Lut4GemmCase(16, 128, 1024, codebook="group").make(device)
    first = lut4_gemm(*args, **kwargs)
    for _ in range(5):
        assert_equal(lut4_gemm(*args, **kwargs), first)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_of_x_and_bias_is_the_dense_one(codebook: str, scaled: bool, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = Lut4GemmCase(5, 72, 200, 64, dtype, codebook, scaled, bias=True)
    (x, qweight, table, scales, bias), kwargs = case.make(device)
    eye = torch.eye(200, dtype=torch.float64, device=device)
    weight = lut4_gemm_ref(eye, qweight, table, scales, **kwargs).T[:72]
    x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(5, 72, device=device, dtype=dtype)
    lut4_gemm(x, qweight, table, scales, bias, **kwargs).backward(grad)
    assert_close_to_reference(x.grad, grad.double() @ weight, grad @ weight.to(dtype))
    assert_close_to_reference(bias.grad, grad.double().sum(0), grad.sum(0))
    # The gradient of .sum() is an expanded scalar, with strides 0.
    x.grad = None
    lut4_gemm(x, qweight, table, scales, bias, **kwargs).sum().backward()
    ones = torch.ones_like(grad)
    assert_close_to_reference(x.grad, ones.double() @ weight, ones @ weight.to(dtype))


@pytest.mark.parametrize(("index", "name"), [(2, "codebook"), (3, "scales")])
def test_gradient_of_the_weight_is_refused(index: int, name: str, device: str) -> None:
    args, kwargs = CASE.make(device)
    args[index].requires_grad_()
    with pytest.raises(RuntimeError, match=f"lut4_gemm: {name} must not require a gradient"):
        lut4_gemm(*args, **kwargs)


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
    (wrong(0, torch.ones(6, 192, dtype=torch.int32)), r"x must be float16.* got int32"),
    (wrong(0, torch.ones(())), r"x must be \[\.\.\., K\], got a scalar"),
    (
        wrong(0, torch.ones(6, 193).half()),
        rf"codebook must be {SHAPES} = \[16\], \[72, 16\] or \[72, 4, 16\], got \[72, 3, 16\]",
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
    (
        wrong(3, torch.ones(72, 3, dtype=torch.float64)),
        r"scales must be float16.*, got another dtype",
    ),
    (wrong(3, torch.ones(72, 4)), r"scales must be \[N, ceil\(K/g\)\] = \[72, 3\], got \[72, 4\]"),
    (wrong(3, torch.ones(72)), r"scales must be \[N, ceil\(K/g\)\] = .*, got \[72\]"),
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
    with pytest.raises(RuntimeError, match=f"effllm::lut4_gemm: {message}"):
        lut4_gemm(*moved, group_size=64)


@pytest.mark.parametrize("group_size", [0, -1, 16, 96, 256])
def test_group_size_errors(group_size: int, device: str) -> None:
    (x, qweight, _, _, bias), _ = CASE.make(device)
    message = f"group_size must be 32, 64, 128 or K = 192, got {group_size}"
    with pytest.raises(RuntimeError, match=message):
        lut4_gemm(x, qweight, torch.ones(16, device=device), None, bias, group_size=group_size)


@pytest.mark.gpu
def test_fp32_on_the_gpu_is_a_named_error() -> None:
    (x, *weights), kwargs = CASE.make("cuda")
    with pytest.raises(RuntimeError, match="x must be float16 or bfloat16, got float32"):
        lut4_gemm(x.float(), *weights, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_mixed_devices_are_a_named_error(index: int) -> None:
    args, kwargs = CASE.make("cuda")
    moved = [arg.cpu() if i == index else arg for i, arg in enumerate(args)]
    with pytest.raises(RuntimeError, match=r"must be on (cpu|cuda:0) as x is, got (cpu|cuda:0)"):
        lut4_gemm(*moved, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("m", [0, 1, 20, 200])
def test_captured_as_the_very_first_call_and_replayed_with_other_data(
    m: int, codebook: str
) -> None:
    case = Lut4GemmCase(m, 192, 333, 64, torch.bfloat16, codebook)
    (x, *weights), kwargs = case.make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lut4_gemm(x, *weights, **kwargs)
    x.copy_(hostile.normal(m, 333, dtype=x.dtype, seed=5))
    graph.replay()
    assert_equal(out, lut4_gemm(x, *weights, **kwargs))


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    (x, *weights), kwargs = Lut4GemmCase(8, 64, 64).make("cuda")
    expected = lut4_gemm(x, *weights, **kwargs)
    source, late = x.clone(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(source)
        out = lut4_gemm(late, *weights, **kwargs)
    torch.cuda.synchronize()
    assert_equal(out, expected)
