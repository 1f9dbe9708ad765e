"""w4a8_gemm beyond the cases of the contract: integers to the bit, groups in order, the ends of
int32, layouts, scales that are none, graphs, errors. Of multipliers: test_w4a8_multipliers.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int4_pack, int8_gemm, w4a8_gemm
from effllm.ops.int4_unpack import int4_unpack_ref
from effllm.ops.w4a8_gemm import w4a8_gemm_ref
from effllm.testing import hostile
from effllm.testing.cases.int8_gemm import random_int8
from effllm.testing.cases.w4a8_gemm import (
    CASES,
    QuantizedW4A8GemmCase,
    W4A8GemmCase,
    add_groups_in_order,
    quantize_and_multiply,
)
from effllm.testing.compare import assert_equal
from effllm.testing.run import check_values

HALF, BF16, FP32, INT8, UINT8 = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int8,
    torch.uint8,
)
INF, NAN = math.inf, math.nan
CASE = W4A8GemmCase(6, 200, 320, 64, FP32, zeros=True, bias=True)
NAMES = ("x", "x_scales", "qweight", "scales", "zeros", "bias")
each_group_size = pytest.mark.parametrize("group_size", [32, 64, 128, -1])


def product(x: Tensor, codes: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """w4a8_gemm without scales, in fp32: integers below 2^24 are what they are."""
    n, k = codes.shape
    group_size = k if group_size == -1 else group_size
    ones = torch.ones(n, -(-k // group_size), device=x.device)
    one = torch.ones(1, device=x.device)
    qweight = int4_pack(codes)
    return w4a8_gemm(x, one, qweight, ones, zeros, group_size=group_size, out_dtype=FP32)


def int64_product(x: Tensor, codes: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """By integers alone."""
    k = codes.shape[1]
    weight = codes.cpu().long() - 8
    if zeros is not None:
        spread = zeros.cpu().long().repeat_interleave(k if group_size == -1 else group_size, 1)
        weight = codes.cpu().long() - spread[:, :k]
    return x.cpu().long() @ weight.T


def random_codes(n: int, k: int, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, k), generator=generator, dtype=UINT8).to(device)


def random_zeros(n: int, groups: int, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 129, (n, groups), generator=generator, dtype=UINT8).to(device)


@pytest.mark.parametrize("m", [1, 9, 40, 256])
@pytest.mark.parametrize("first_zero", [None, 0, 64, 113])
def test_every_product_of_codes_in_every_column(
    m: int, first_zero: int | None, device: str
) -> None:
    """One column at a time, all activations by all codes, each row less another zero point."""
    codes = torch.arange(64, dtype=UINT8, device=device).remainder(16).repeat(128, 2)
    zeros = None
    if first_zero is not None:
        zeros = torch.arange(first_zero, first_zero + 16, dtype=UINT8, device=device)
        zeros = zeros.repeat_interleave(8)[:, None]
    values = torch.arange(m, device=device).mul(257).remainder(256).sub(128).to(INT8)
    for column in (*range(0, 20), 31, 32, 47, 63, 64, 79, 97, 127):
        x = torch.zeros(m, 128, dtype=INT8, device=device)
        x[:, column] = values
        rolled = codes.roll(1, 0) if zeros is None else codes
        found = product(x, rolled, zeros, -1)
        assert_equal(found.cpu(), int64_product(x, rolled, zeros, -1).float())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(1, 140), st.integers(1, 300)),
    group_size=st.sampled_from([32, 64, 128, -1]),
    zeros=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_size_equals_integers(
    sizes: tuple[int, int, int], group_size: int, zeros: bool, seed: int
) -> None:
    m, n, k = sizes
    x, codes = random_int8(m, k, seed), random_codes(n, k, seed + 1)
    groups = 1 if group_size == -1 else -(-k // group_size)
    zero = random_zeros(n, groups, seed + 2) if zeros else None
    expected = int64_product(x, codes, zero, group_size).float()
    assert_equal(product(x, codes, zero, group_size), expected)


@each_group_size
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 136, 4112), (17, 264, 2064), (64, 1032, 528), (300, 520, 1040)]
)
def test_integers_to_the_bit(
    m: int, n: int, k: int, zeros: bool, group_size: int, device: str
) -> None:
    """Sums of groups that are added without rounding have one order as well as any other."""
    x, codes = random_int8(m, k, 0, device), random_codes(n, k, 1, device)
    groups = 1 if group_size == -1 else -(-k // group_size)
    zero = random_zeros(n, groups, 2, device) if zeros else None
    expected = int64_product(x, codes, zero, group_size)
    assert expected.abs().max() < 2**24
    assert_equal(product(x, codes, zero, group_size).cpu(), expected.float())


@pytest.mark.parametrize("case", [case for case in CASES if case.k > 0], ids=lambda case: case.id)
def test_groups_are_added_in_order_on_the_cpu(case: W4A8GemmCase) -> None:
    args, kwargs = case.make("cpu")
    if args[3].shape[1] > 1:
        assert_equal(w4a8_gemm(*args, **kwargs), add_groups_in_order(*args, **kwargs))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("m", [1, 20, 70, 300])
def test_one_group_is_int8_gemm_to_the_bit(m: int, zeros: bool, device: str) -> None:
    for out_dtype in (FP32, BF16, HALF):
        case = W4A8GemmCase(m, 264, 1040, -1, out_dtype, zeros, True, FP32)
        (x, x_scales, qweight, scales, zero, bias), kwargs = case.make(device)
        codes = int4_unpack_ref(qweight, 264, 1040).int()
        weight = (codes - (8 if zero is None else zero.int())).to(INT8)
        expected = int8_gemm(x, x_scales, weight, scales, bias, out_dtype=out_dtype)
        found = w4a8_gemm(x, x_scales, qweight, scales, zero, bias, **kwargs)
        assert_equal(found, expected)


@pytest.mark.parametrize("k", [131071, 131056])
@pytest.mark.parametrize("m", [1, 20, 70])
def test_the_ends_of_int32(m: int, k: int, device: str) -> None:
    """-128 * -128 * K is just below 2^31, and 127 * -128 * K near the other end."""
    x = torch.full((m, k), -128, dtype=INT8, device=device)
    x[1::2] = 127
    codes = torch.zeros(16, k, dtype=UINT8, device=device)
    codes[1::2, ::2] = 15
    zeros = torch.full((16, 1), 128, dtype=UINT8, device=device)
    zeros[2:4] = 0
    expected = int64_product(x, codes, zeros, -1)
    assert expected.max() == 2**14 * k
    assert_equal(product(x, codes, zeros, -1).cpu(), expected.float())
    expected = int64_product(x, codes, None, -1)
    assert_equal(product(x, codes, None, -1).cpu(), expected.float())


@each_group_size
@pytest.mark.parametrize("zeros", [False, True])
def test_results_on_the_cpu_do_not_depend_on_the_batch(group_size: int, zeros: bool) -> None:
    case = W4A8GemmCase(101, 90, 300, group_size, zeros=zeros)
    (x, x_scales, *weights), kwargs = case.make("cpu")
    together = w4a8_gemm(x, x_scales, *weights, **kwargs)
    for size in (1, 2, 3, 4, 49):
        for first in (0, 50, 101 - size):
            part = slice(first, first + size)
            alone = w4a8_gemm(x[part], x_scales[part], *weights, **kwargs)
            assert_equal(alone, together[part])


@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("group_size", [128, -1])
def test_behind_int8_quantize(m: int, group_size: int, device: str) -> None:
    case = QuantizedW4A8GemmCase(m, 208, 384, group_size, zeros=True, bias=True)
    check_values(quantize_and_multiply, case, device)
    args, options = case.make(device)
    others = case.prepare_others(*args, **options)
    assert_equal(others["w4a8_gemm alone"](), quantize_and_multiply(*args, **options))


def test_what_benchmarks_time_beside_it_is_the_same_problem(device: str) -> None:
    case = W4A8GemmCase(5, 64, 256, 64, zeros=True, bias=True)
    (x, _, *weights), kwargs = case.make(device)
    one = torch.ones(1, device=device)
    expected = w4a8_gemm_ref(x, one, *weights, **kwargs).to(BF16)
    args = (x, one, *weights)
    results = [case.prepare_baseline(*args, **kwargs)()]
    results += [run() for run in case.prepare_others(*args, **kwargs).values()]
    size = expected.double().norm()
    for result in results:
        assert (result.double() - expected.double()).norm() < 0.01 * size


def test_leading_dimensions_and_strides(device: str) -> None:
    (x, x_scales, *weights), kwargs = CASE.make(device)
    expected = w4a8_gemm(x, x_scales, *weights, **kwargs)
    cube, scales_cube = x.view(2, 3, -1), x_scales.view(2, 3, -1)
    cubic = w4a8_gemm(cube, scales_cube, *weights, **kwargs)
    assert_equal(cubic, expected.view(2, 3, 200))
    crossed = scales_cube.transpose(0, 1).contiguous().transpose(0, 1)
    assert_equal(w4a8_gemm(cube, crossed, *weights, **kwargs), expected.view(2, 3, 200))
    assert_equal(w4a8_gemm(x[1], x_scales[1], *weights, **kwargs), expected[1])
    for position in (0, 1, 3, 4, 5):
        args = [x, x_scales, *weights]
        for name, view in hostile.odd_strides(args[position]):
            strided, dense = list(args), list(args)
            strided[position], dense[position] = view, view.contiguous()
            found = w4a8_gemm(*strided, **kwargs)
            assert_equal(found, w4a8_gemm(*dense, **kwargs), name=f"{NAMES[position]} {name}")


@each_group_size
def test_slices_of_a_packed_weight(group_size: int, device: str) -> None:
    """Rows of it are strided then, and what lies between them is of another slice."""
    case = W4A8GemmCase(4, 128, 512, group_size, FP32, zeros=True)
    (x, x_scales, qweight, scales, zeros, _), kwargs = case.make(device)
    columns = scales.shape[1] // 2 if group_size != -1 else 1
    for half in range(2):
        words = qweight[:, 2048 * half : 2048 * (half + 1)]
        part = slice(columns * half, columns * (half + 1)) if group_size != -1 else slice(0, 1)
        kwargs["group_size"] = 256 if group_size == -1 else group_size
        args = (
            x[:, 256 * half : 256 * (half + 1)],
            x_scales,
            words,
            scales[:, part],
            zeros[:, part],
        )
        dense = [arg.contiguous() for arg in args]
        assert_equal(w4a8_gemm(*args, **kwargs), w4a8_gemm(*dense, **kwargs))


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 7, 8, 12])
def test_x_anywhere_in_memory(offset: int, device: str) -> None:
    for m, k in ((3, 320), (20, 136), (70, 77)):
        x, codes = random_int8(m, k, 0, device), random_codes(70, k, 1, device)
        memory = torch.full((offset + m * k,), 127, dtype=INT8, device=device)
        view = memory[offset:].view(m, k)
        view.copy_(x)
        assert_equal(product(view, codes, None, -1), product(x, codes, None, -1))


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [0.0, INF, NAN, -1.0])
@pytest.mark.parametrize("group_size", [64, -1])
def test_scales_that_are_no_scales_reach_their_outputs_alone(
    value: float, group_size: int, out_dtype: torch.dtype, device: str
) -> None:
    case = W4A8GemmCase(5, 304, 272, group_size, out_dtype, bias=True)
    args, kwargs = case.make(device)
    expected = w4a8_gemm(*args, **kwargs)
    args[1][3], args[3][1, -1] = value, value
    found = w4a8_gemm(*args, **kwargs)
    kept = torch.ones_like(expected, dtype=torch.bool)
    kept[3] = kept[:, 1] = False
    assert_equal(found[kept], expected[kept])
    wanted = case.baseline(*args, **kwargs)
    assert_equal(found.isfinite(), wanted.isfinite())
    assert_equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("m", [3, 40])
def test_larger_zero_points(m: int, group_size: int, device: str) -> None:
    """The CPU raises; the GPU, which cannot raise, takes them for 128."""
    case = replace(CASE, m=m, group_size=group_size)
    (x, x_scales, qweight, scales, zeros, bias), kwargs = case.make(device)
    zeros[17, -1] = 129
    zeros[60, 0] = 255
    args = (x, x_scales, qweight, scales)
    if device == "cpu":
        where = rf"got 129 at \[17, {zeros.shape[1] - 1}\]"
        with pytest.raises(RuntimeError, match=f"zeros must be at most 128, {where}"):
            w4a8_gemm(*args, zeros, bias, **kwargs)
    else:
        expected = w4a8_gemm(*args, zeros.clamp(max=128), bias, **kwargs)
        assert_equal(w4a8_gemm(*args, zeros, bias, **kwargs), expected)


# Every tile of the Hopper kernel, with whole, split and half-empty ones of them.
SMALL = [
    (1, 4096, 4096),
    (16, 1024, 14336),
    (20, 1024, 4096),
    (32, 6144, 1040),
    (33, 576, 7168),
    (64, 2112, 2048),
    (100, 520, 4096),
    (128, 4096, 4112),
]
LARGE = [
    (257, 1024, 640),
    (700, 3072, 528),
    (1024, 576, 896),
    (1030, 6152, 1040),
    (2049, 5000, 2064),
    (4100, 1032, 400),
]


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [FP32, BF16, HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zeros", [False, True])
@each_group_size
@pytest.mark.parametrize(("m", "n", "k"), SMALL + LARGE)
def test_tiles_of_the_gpu(
    m: int, n: int, k: int, group_size: int, zeros: bool, out_dtype: torch.dtype
) -> None:
    check_values(w4a8_gemm, W4A8GemmCase(m, n, k, group_size, out_dtype, zeros, True), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_results_repeat_to_the_bit(out_dtype: torch.dtype, group_size: int) -> None:
    """Between other kernels, so that launches that start early meet them."""
    for m, n, k in SMALL + LARGE:
        args, kwargs = W4A8GemmCase(m, n, k, group_size, out_dtype, zeros=True).make("cuda")
        first = w4a8_gemm(*args, **kwargs)
        for _ in range(20):
            args[0].add_(0)
            assert_equal(w4a8_gemm(*args, **kwargs), first)


@pytest.mark.gpu
@each_group_size
def test_last_round_of_large_tiles(group_size: int) -> None:
    """Of 137 tiles of 256 tokens a CTA each takes 120, and clusters share the others."""
    case = W4A8GemmCase(129, 17536, 4096, group_size, bias=True)
    check_values(w4a8_gemm, case, "cuda")
    args, kwargs = case.make("cuda")
    first = w4a8_gemm(*args, **kwargs)
    for _ in range(20):
        assert_equal(w4a8_gemm(*args, **kwargs), first)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1368, 1376])
@pytest.mark.parametrize("m", [0, 1, 20, 300])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_captured_as_the_very_first_call_and_repeatable(group_size: int, m: int, k: int) -> None:
    """One K that TMA does not read, and one that it does."""
    args, kwargs = W4A8GemmCase(m, 520, k, group_size).make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = w4a8_gemm(*args, **kwargs)
    args[0].copy_(random_int8(m, k, 5))
    for _ in range(100):
        graph.replay()
        assert_equal(out, w4a8_gemm(*args, **kwargs))


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(6, 320)}, "x must be int8, got float32"),
    ({"x": torch.ones((), dtype=INT8)}, r"x must be \[\.\.\., K\], got a scalar"),
    (
        {"x": torch.ones(6, 384, dtype=INT8)},
        r"scales must be \[N, ceil\(K/g\)\] = \[200, 6\], got \[200, 5\]",
    ),
    ({"x_scales": torch.ones(6, 2)}, r"x_scales must have one element, .*, got \[6, 2\]"),
    ({"x_scales": torch.ones(6)}, r"x_scales must have one element, .*, got \[6\]"),
    ({"x_scales": torch.ones(6, 1, dtype=torch.int32)}, "x_scales must be float16, .*, got int32"),
    ({"qweight": torch.ones(4, 2560)}, "qweight must be int32, got float32"),
    (
        {"qweight": torch.ones(3, 2560, dtype=torch.int32)},
        r"qweight must be \[ceil\(N/64\), ceil\(K/64\)\*512\] = \[4, 2560\], got \[3, 2560\]",
    ),
    ({"zeros": torch.ones(200, 5)}, "zeros must be uint8, got float32"),
    (
        {"zeros": torch.ones(200, 4, dtype=UINT8)},
        r"zeros must be .* = \[200, 5\], got \[200, 4\]",
    ),
    ({"bias": torch.ones(199)}, r"bias must be \[N\] = \[200\], got \[199\]"),
    ({"group_size": 65}, "group_size must be 32, 64, 128 or K = 320, got 65"),
    ({"group_size": 0}, "group_size must be 32, 64, 128 or K = 320, got 0"),
    ({"out_dtype": torch.float64}, "out_dtype must be float16, bfloat16 or float32, got another"),
    ({"out_dtype": INT8}, "out_dtype must be float16, bfloat16 or float32, got int8"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors(wrong: dict[str, Any], message: str, device: str) -> None:
    args, kwargs = CASE.make(device)
    arguments = dict(zip(NAMES, args, strict=True)) | kwargs
    arguments |= {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in wrong.items()
    }
    with pytest.raises(RuntimeError, match=f"effllm::w4a8_gemm: {message}"):
        w4a8_gemm(**arguments)


def test_sums_that_could_overflow_are_refused(device: str) -> None:
    k = 131072
    x = torch.ones(1, k, dtype=INT8, device=device)
    codes = torch.ones(8, k, dtype=UINT8, device=device)
    message = "K must be at most 131071 in one group, so"
    with pytest.raises(RuntimeError, match=f"effllm::w4a8_gemm: {message}"):
        product(x, codes, None, -1)
    assert_equal(product(x, codes, None, 128), torch.full((1, 8), -7.0 * k, device=device))


@pytest.mark.gpu
def test_another_device_is_a_named_error() -> None:
    (x, x_scales, qweight, scales, *_), kwargs = CASE.make("cuda")
    with pytest.raises(RuntimeError, match="scales must be on cuda:0 as x is, got cpu"):
        w4a8_gemm(x, x_scales, qweight, scales.cpu(), **kwargs)
