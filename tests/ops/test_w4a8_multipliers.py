"""w4a8_gemm with multipliers: integers to the bit, whatever the group, tile and device; layouts,
values that are too large, graphs, errors."""

from __future__ import annotations

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
from effllm.testing.cases.w4a8_gemm import TwoLevelW4A8GemmCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import check_values

HALF, BF16, FP32, INT8, UINT8 = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int8,
    torch.uint8,
)
CASE = TwoLevelW4A8GemmCase(6, 200, 320, 64, FP32, bias=True)
NAMES = ("x", "x_scales", "qweight", "scales", "zeros", "bias", "multipliers")
each_group_size = pytest.mark.parametrize("group_size", [32, 64, 128, -1])


def product(x: Tensor, codes: Tensor, multipliers: Tensor, group_size: int) -> Tensor:
    """w4a8_gemm with scales of 1, in fp32: integers below 2^24 are what they are."""
    n, k = codes.shape
    ones, one = torch.ones(n, 1, device=x.device), torch.ones(1, device=x.device)
    return w4a8_gemm(
        x,
        one,
        int4_pack(codes),
        ones,
        multipliers=multipliers,
        group_size=k if group_size == -1 else group_size,
        out_dtype=FP32,
    )


def int8_weight(codes: Tensor, multipliers: Tensor, group_size: int) -> Tensor:
    """What the format stands for, by integers alone; all of it is int8."""
    k = codes.shape[1]
    spread = multipliers.repeat_interleave(k if group_size == -1 else group_size, 1)[:, :k]
    weight = (codes.int() - 8) * spread.int()
    assert weight.numel() == 0 or (weight.min() >= -120 and weight.max() <= 105)
    return weight.to(INT8)


def int64_product(x: Tensor, codes: Tensor, multipliers: Tensor, group_size: int) -> Tensor:
    return x.cpu().long() @ int8_weight(codes, multipliers, group_size).cpu().long().T


def random_below_16(rows: int, columns: int, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 16, (rows, columns), generator=generator, dtype=UINT8)
    return numbers.to(device)


def num_groups(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-k // group_size)


@pytest.mark.parametrize("m", [1, 9, 40, 256])
@each_group_size
def test_every_code_by_every_multiplier_in_every_column(
    m: int, group_size: int, device: str
) -> None:
    """One column at a time; a row has one code, and a multiplier that is another in each group."""
    n, k = 256, 160
    codes = torch.arange(n, dtype=UINT8, device=device).remainder(16)[:, None].repeat(1, k)
    first = torch.arange(n, device=device)[:, None] // 16
    step = torch.arange(num_groups(k, group_size), device=device)
    multipliers = (first + 5 * step).remainder(16).to(UINT8)
    values = torch.arange(m, device=device).mul(257).remainder(256).sub(128).to(INT8)
    for column in (*range(0, 20), 31, 32, 47, 63, 64, 79, 97, 127, 128, 159):
        x = torch.zeros(m, k, dtype=INT8, device=device)
        x[:, column] = values
        expected = int64_product(x, codes, multipliers, group_size).float()
        assert_equal(product(x, codes, multipliers, group_size).cpu(), expected)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(1, 140), st.integers(1, 300)),
    group_size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 100),
)
def test_any_size_equals_integers(sizes: tuple[int, int, int], group_size: int, seed: int) -> None:
    m, n, k = sizes
    x, codes = random_int8(m, k, seed), random_below_16(n, k, seed + 1)
    multipliers = random_below_16(n, num_groups(k, group_size), seed + 2)
    expected = int64_product(x, codes, multipliers, group_size).float()
    assert_equal(product(x, codes, multipliers, group_size), expected)


@pytest.mark.parametrize("out_dtype", [FP32, BF16, HALF], ids=["fp32", "bf16", "fp16"])
@each_group_size
@pytest.mark.parametrize("m", [1, 20, 70, 300])
def test_is_int8_gemm_to_the_bit(
    m: int, group_size: int, out_dtype: torch.dtype, device: str
) -> None:
    for k in (1040, 1072, 333):
        case = TwoLevelW4A8GemmCase(m, 264, k, group_size, out_dtype, False, True, FP32)
        (x, x_scales, qweight, scales, _, bias, multipliers), kwargs = case.make(device)
        weight = int8_weight(int4_unpack_ref(qweight, 264, k), multipliers, group_size)
        expected = int8_gemm(x, x_scales, weight, scales, bias, out_dtype=out_dtype)
        found = w4a8_gemm(x, x_scales, qweight, scales, None, bias, multipliers, **kwargs)
        assert_equal(found, expected)


@each_group_size
def test_multipliers_of_one_are_no_multipliers(group_size: int, device: str) -> None:
    (x, x_scales, qweight, scales, _, bias, multipliers), kwargs = CASE.make(device)
    ones = torch.ones_like(multipliers)
    one_group = kwargs | {"group_size": 320}
    expected = w4a8_gemm(x, x_scales, qweight, scales, None, bias, **one_group)
    assert_equal(w4a8_gemm(x, x_scales, qweight, scales, None, bias, ones, **kwargs), expected)


@pytest.mark.parametrize("k", [131071, 131056])
@pytest.mark.parametrize("m", [1, 20, 70])
def test_the_ends_of_int32(m: int, k: int, device: str) -> None:
    """-120 * -128 * K is near 2^31, and 127 * -120 * K near the other end."""
    x = torch.full((m, k), -128, dtype=INT8, device=device)
    x[1::2] = 127
    codes = torch.zeros(16, k, dtype=UINT8, device=device)
    codes[1::2] = 15
    codes[4:6, ::2] = 15
    for group_size in (128, -1):
        groups = num_groups(k, group_size)
        multipliers = torch.full((16, groups), 15, dtype=UINT8, device=device)
        expected = int64_product(x, codes, multipliers, group_size)
        assert expected.max() == 120 * 128 * k
        assert_equal(product(x, codes, multipliers, group_size).cpu(), expected.float())


@each_group_size
def test_results_on_the_cpu_do_not_depend_on_the_batch(group_size: int) -> None:
    case = TwoLevelW4A8GemmCase(101, 90, 300, group_size)
    (x, x_scales, *weights), kwargs = case.make("cpu")
    together = w4a8_gemm(x, x_scales, *weights, **kwargs)
    for size in (1, 2, 3, 4, 49):
        for first in (0, 50, 101 - size):
            part = slice(first, first + size)
            alone = w4a8_gemm(x[part], x_scales[part], *weights, **kwargs)
            assert_equal(alone, together[part])


def test_what_benchmarks_time_beside_it_is_the_same_problem(device: str) -> None:
    case = TwoLevelW4A8GemmCase(5, 64, 256, 64, bias=True)
    (x, _, *weights), kwargs = case.make(device)
    one = torch.ones(1, device=device)
    expected = w4a8_gemm_ref(x, one, *weights, **kwargs).to(BF16)
    args = (x, one, *weights)
    results = [case.prepare_baseline(*args, **kwargs)()]
    results += [run() for run in case.prepare_others(*args, **kwargs).values()]
    size = expected.double().norm()
    for result in results:
        assert (result.double() - expected.double()).norm() < 0.01 * size


@each_group_size
@pytest.mark.parametrize("m", [3, 40])
def test_strides(m: int, group_size: int, device: str) -> None:
    args, kwargs = replace(CASE, m=m, group_size=group_size).make(device)
    for position in (3, 6):
        for name, view in hostile.odd_strides(args[position]):
            strided, dense = list(args), list(args)
            strided[position], dense[position] = view, view.contiguous()
            found = w4a8_gemm(*strided, **kwargs)
            assert_equal(found, w4a8_gemm(*dense, **kwargs), name=f"{NAMES[position]} {name}")


@each_group_size
def test_slices_of_a_packed_weight(group_size: int, device: str) -> None:
    """Rows of it are strided then, and what lies between them is of another slice."""
    case = TwoLevelW4A8GemmCase(4, 128, 512, group_size, FP32)
    (x, x_scales, qweight, scales, _, _, multipliers), kwargs = case.make(device)
    columns = multipliers.shape[1] // 2 if group_size != -1 else 1
    kwargs["group_size"] = 256 if group_size == -1 else group_size
    for half in range(2):
        part = slice(columns * half, columns * (half + 1)) if group_size != -1 else slice(0, 1)
        args = (
            x[:, 256 * half : 256 * (half + 1)],
            x_scales,
            qweight[:, 2048 * half : 2048 * (half + 1)],
            scales,
        )
        factors = multipliers[:, part]
        dense = [arg.contiguous() for arg in args]
        found = w4a8_gemm(*args, multipliers=factors, **kwargs)
        assert_equal(found, w4a8_gemm(*dense, multipliers=factors.contiguous(), **kwargs))


@each_group_size
@pytest.mark.parametrize("m", [3, 40])
def test_larger_multipliers(m: int, group_size: int, device: str) -> None:
    """The CPU raises; the GPU, which cannot raise, takes their low four bits."""
    args, kwargs = replace(CASE, m=m, group_size=group_size).make(device)
    multipliers = args[6]
    multipliers[17, -1] = 16
    multipliers[60, 0] = 255
    if device == "cpu":
        where = rf"got 16 at \[17, {multipliers.shape[1] - 1}\]"
        with pytest.raises(RuntimeError, match=f"multipliers must be at most 15, {where}"):
            w4a8_gemm(*args, **kwargs)
    else:
        expected = w4a8_gemm(*args[:6], multipliers & 15, **kwargs)
        assert_equal(w4a8_gemm(*args, **kwargs), expected)


def test_memory_beside_multipliers_does_not_matter(device: str) -> None:
    """Their rows end in the middle of what a kernel might read at once."""
    for group_size in (32, 128):
        args, kwargs = TwoLevelW4A8GemmCase(20, 72, 1040, group_size).make(device)
        expected = w4a8_gemm(*args, **kwargs)
        wide = torch.full((72, args[6].shape[1] + 7), 255, dtype=UINT8, device=device)
        wide[:, 3:-4] = args[6]
        assert_equal(w4a8_gemm(*args[:6], wide[:, 3:-4], **kwargs), expected)


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan, -1.0])
def test_scales_that_are_no_scales_reach_their_outputs_alone(
    value: float, out_dtype: torch.dtype, device: str
) -> None:
    args, kwargs = TwoLevelW4A8GemmCase(5, 304, 272, 64, out_dtype, bias=True).make(device)
    expected = w4a8_gemm(*args, **kwargs)
    args[1][3], args[3][1] = value, value
    found = w4a8_gemm(*args, **kwargs)
    kept = torch.ones_like(expected, dtype=torch.bool)
    kept[3] = kept[:, 1] = False
    assert_equal(found[kept], expected[kept])
    wanted = w4a8_gemm_ref(*args, **kwargs)
    assert_equal(found.isfinite(), wanted.isfinite())
    assert_equal(found.isnan(), wanted.isnan())


# Every tile of the Hopper kernel, with whole, split and half-empty ones of them.
SHAPES = [
    (1, 4096, 4096),
    (16, 1024, 14336),
    (20, 1024, 4096),
    (32, 6144, 1040),
    (33, 576, 7168),
    (64, 2112, 2048),
    (100, 520, 4096),
    (128, 4096, 4112),
    (257, 1024, 640),
    (700, 3072, 528),
    (1024, 576, 896),
    (1030, 6152, 1040),
    (2049, 5000, 2064),
    (4100, 1032, 400),
]


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [FP32, BF16, HALF], ids=["fp32", "bf16", "fp16"])
@each_group_size
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_tiles_of_the_gpu(m: int, n: int, k: int, group_size: int, out_dtype: torch.dtype) -> None:
    case = TwoLevelW4A8GemmCase(m, n, k, group_size, out_dtype, False, True)
    check_values(w4a8_gemm, case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_results_repeat_to_the_bit(out_dtype: torch.dtype, group_size: int) -> None:
    """Between other kernels, so that launches that start early meet them."""
    for m, n, k in SHAPES:
        args, kwargs = TwoLevelW4A8GemmCase(m, n, k, group_size, out_dtype).make("cuda")
        first = w4a8_gemm(*args, **kwargs)
        for _ in range(20):
            args[0].add_(0)
            assert_equal(w4a8_gemm(*args, **kwargs), first)


@pytest.mark.gpu
@each_group_size
def test_last_round_of_large_tiles(group_size: int) -> None:
    """Of 137 tiles of 256 tokens a CTA each takes 120, and clusters share the others."""
    case = TwoLevelW4A8GemmCase(129, 17536, 4096, group_size, bias=True)
    check_values(w4a8_gemm, case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1368, 1376])
@pytest.mark.parametrize("m", [0, 1, 20, 300])
@each_group_size
def test_captured_as_the_very_first_call_and_repeatable(group_size: int, m: int, k: int) -> None:
    """One K that TMA does not read, and one that it does."""
    args, kwargs = TwoLevelW4A8GemmCase(m, 520, k, group_size).make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = w4a8_gemm(*args, **kwargs)
    args[0].copy_(random_int8(m, k, 5))
    for _ in range(100):
        graph.replay()
        assert_equal(out, w4a8_gemm(*args, **kwargs))


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"multipliers": torch.ones(200, 5)}, "multipliers must be uint8, got float32"),
    ({"multipliers": torch.ones(200, 5, dtype=INT8)}, "multipliers must be uint8, got int8"),
    (
        {"multipliers": torch.ones(200, 1, dtype=UINT8)},
        r"multipliers must be \[N, ceil\(K/g\)\] = \[200, 5\], got \[200, 1\]",
    ),
    ({"multipliers": torch.ones(5, dtype=UINT8)}, r"multipliers must be .*, got \[5\]"),
    ({"scales": torch.ones(200, 5)}, r"scales must be \[N, 1\] = \[200, 1\], got \[200, 5\]"),
    ({"scales": torch.ones(200)}, r"scales must be \[N, 1\] = \[\?, 1\], got \[200\]"),
    (
        {"zeros": torch.ones(200, 5, dtype=UINT8)},
        r"zeros must be None beside multipliers, got \[200, 5\]",
    ),
    ({"group_size": 65}, "group_size must be 32, 64, 128 or K = 320, got 65"),
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
    multipliers = torch.ones(8, k // 128, dtype=UINT8, device=device)
    message = (
        "K must be at most 131071 with multipliers, so that no sum overflows int32, got 131072"
    )
    with pytest.raises(RuntimeError, match=f"effllm::w4a8_gemm: {message}"):
        product(x, codes, multipliers, 128)


@pytest.mark.gpu
def test_another_device_is_a_named_error() -> None:
    (*args, multipliers), kwargs = CASE.make("cuda")
    with pytest.raises(RuntimeError, match="multipliers must be on cuda:0 as x is, got cpu"):
        w4a8_gemm(*args, multipliers.cpu(), **kwargs)
