"""int8_gemm beyond the cases of the contract: integers to the bit, the ends of int32, layouts,
scales that are none, graphs, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import int8_gemm
from effllm.ops.int8_gemm import int8_gemm_ref
from effllm.testing import hostile
from effllm.testing.cases.int8_gemm import (
    PAIRS,
    Int8GemmCase,
    QuantizedInt8GemmCase,
    quantize_and_multiply,
    random_int8,
)
from effllm.testing.compare import assert_equal
from effllm.testing.run import check_values

HALF, BF16, FP32, INT8 = torch.float16, torch.bfloat16, torch.float32, torch.int8
INF, NAN = math.inf, math.nan
CASE = Int8GemmCase(6, 200, 320, out_dtype=FP32, bias=True, zeros_per="row")
both_widths = pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])


def int64_product(x: Tensor, weight: Tensor, zeros: Tensor | None = None) -> Tensor:
    """By integers alone."""
    codes = x.cpu().long() if zeros is None else x.cpu().long() - zeros.cpu().long()
    return codes @ weight.cpu().long().T


def product(x: Tensor, weight: Tensor, zeros: Tensor | None = None, **kwargs: Any) -> Tensor:
    """int8_gemm without scales, in fp32: integers below 2^24 are what they are."""
    one = torch.ones(1, device=x.device)
    return int8_gemm(x, one, weight, one, None, zeros, out_dtype=FP32, **kwargs)


@pytest.mark.parametrize("m", [1, 9, 40])
def test_every_product_of_codes(m: int, device: str) -> None:
    codes = torch.arange(-128, 128, dtype=INT8, device=device)
    weight = codes.unsqueeze(1)
    for first in range(0, 256, m):
        x = codes[first : first + m].unsqueeze(1)
        assert_equal(product(x, weight).cpu(), int64_product(x, weight).float())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(0, 300)),
    zeros=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_size_equals_integers(sizes: tuple[int, int, int], zeros: bool, seed: int) -> None:
    m, n, k = sizes
    x, weight = random_int8(m, k, seed), random_int8(n, k, seed + 1)
    zero = random_int8(m, 1, seed + 2) if zeros else None
    assert_equal(product(x, weight, zero), int64_product(x, weight, zero).float())


@pytest.mark.parametrize("k", [131071, 131056])
@pytest.mark.parametrize("m", [1, 20, 70])
def test_the_ends_of_int32(m: int, k: int, device: str) -> None:
    """-128 * -128 * K is just below 2^31, and -128 * 127 * K near the other end."""
    x = torch.full((m, k), -128, dtype=INT8, device=device)
    weight = torch.full((16, k), -128, dtype=INT8, device=device)
    weight[1::2] = 127
    weight[2:4, -1] = 0
    weight[4, ::2] = 127
    x[1:, ::2] = 127
    expected = int64_product(x, weight)
    assert expected.abs().max() == 2**14 * k
    assert_equal(product(x, weight).cpu(), expected.float())
    tiny = torch.tensor(2.0**-20, device=device)
    out = int8_gemm(x, tiny, weight, tiny, out_dtype=FP32)
    assert_equal(out.cpu(), expected.float() * 2.0**-40)


@pytest.mark.parametrize("m", [1, 20, 70])
def test_every_bit_of_large_sums(m: int, device: str) -> None:
    """fp32 keeps 24 bits of a sum; of what is left when most of it has been subtracted, all."""
    k = 65792
    x, weight = random_int8(1, k, 0, device).abs(), random_int8(16, k, 1, device).abs()
    sums = int64_product(x, weight)[0]
    assert sums.min() > 2**27
    zero = torch.ones(1, dtype=INT8, device=device)
    near = (sums - torch.arange(16) * 3).int().to(device)
    out = product(x.expand(m, k), weight, zero, w_sums=near)
    assert_equal(out.cpu(), (torch.arange(16.0) * 3).expand(m, 16))


@pytest.mark.parametrize("k", [65793, 65792])
@pytest.mark.parametrize("zero", [-128, 127])
def test_the_ends_of_int32_with_zero_points(zero: int, k: int, device: str) -> None:
    """255 * 128 * K is just below 2^31, and wraps on the way there."""
    zeros = torch.tensor([zero], dtype=INT8, device=device)
    x = torch.full((3, k), 127 if zero < 0 else -128, dtype=INT8, device=device)
    weight = torch.full((16, k), -128, dtype=INT8, device=device)
    weight[1::2] = 127
    expected = int64_product(x, weight, zeros)
    assert expected.abs().max() == 255 * 128 * k
    assert_equal(product(x, weight, zeros).cpu(), expected.float())


def test_sums_that_are_given_are_the_ones_used(device: str) -> None:
    x, weight = random_int8(5, 96, 0, device), random_int8(64, 96, 1, device)
    zeros = random_int8(5, 1, 2, device)
    w_sums = weight.sum(1, dtype=torch.int32)
    expected = product(x, weight, zeros)
    assert_equal(product(x, weight, zeros, w_sums=w_sums), expected)
    wide = torch.stack([w_sums, w_sums + 7], 1)
    assert_equal(product(x, weight, zeros, w_sums=wide[:, 0]), expected)
    off_by_one = product(x, weight, zeros, w_sums=w_sums + 1)
    assert_equal(off_by_one, expected - zeros.float())


@pytest.mark.parametrize(("x_per", "w_per"), PAIRS)
def test_results_on_the_cpu_do_not_depend_on_the_batch(x_per: str, w_per: str) -> None:
    (x, x_scales, weight, w_scales, *_), kwargs = Int8GemmCase(70, 90, 300, x_per, w_per).make(
        "cpu"
    )
    together = int8_gemm(x, x_scales, weight, w_scales, **kwargs)
    for m in (0, 3, 69):
        scales = x_scales if x_per == "tensor" else x_scales[m : m + 1]
        alone = int8_gemm(x[m : m + 1], scales, weight, w_scales, **kwargs)
        assert_equal(alone, together[m : m + 1])


@pytest.mark.parametrize("m", [1, 33])
def test_behind_int8_quantize(m: int, device: str) -> None:
    case = QuantizedInt8GemmCase(m, 208, 384, bias=True)
    check_values(quantize_and_multiply, case, device)
    args, options = case.make(device)
    others = case.prepare_others(*args, **options)
    assert_equal(others["int8_gemm alone"](), quantize_and_multiply(*args, **options))


@pytest.mark.parametrize("m", [32, 64])
def test_agrees_with_int_mm(m: int, device: str) -> None:
    """What benchmarks time beside ours is the same product."""
    case = Int8GemmCase(m, 256, 512)
    args, options = case.make(device)
    try:
        sums = case.prepare_others(*args, **options)["torch._int_mm"]()
    except RuntimeError as error:
        pytest.skip(f"this torch or GPU has no such kernel: {error}")
    assert_equal(product(args[0], args[2]), sums.float())


def test_leading_dimensions_and_strides(device: str) -> None:
    (x, x_scales, weight, w_scales, bias, zeros, _), kwargs = CASE.make(device)
    expected = int8_gemm(x, x_scales, weight, w_scales, bias, zeros, **kwargs)
    cube, scales_cube, zeros_cube = (t.view(2, 3, -1) for t in (x, x_scales, zeros))
    cubic = int8_gemm(cube, scales_cube, weight, w_scales, bias, zeros_cube, **kwargs)
    assert_equal(cubic, expected.view(2, 3, 200))
    # Leading dimensions that no single stride steps through.
    crossed = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (scales_cube, zeros_cube)]
    cubic = int8_gemm(cube, crossed[0], weight, w_scales, bias, crossed[1], **kwargs)
    assert_equal(cubic, expected.view(2, 3, 200))
    single = int8_gemm(x[1], x_scales[1], weight, w_scales, bias, zeros[1], **kwargs)
    assert_equal(single, expected[1])

    for position, tensor in ((0, x), (1, x_scales), (3, w_scales), (4, bias), (5, zeros)):
        for name, view in hostile.odd_strides(tensor):
            args = [x, x_scales, weight, w_scales, bias, zeros]
            args[position] = view
            found = int8_gemm(*args, **kwargs)
            args[position] = view.contiguous()
            assert_equal(found, int8_gemm(*args, **kwargs), name=f"argument {position} {name}")


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 7, 8, 12])
@pytest.mark.parametrize("gap", [0, 1, 4, 16])
def test_operands_anywhere_in_memory(offset: int, gap: int, device: str) -> None:
    """Rows at any address and any distance; what lies between them is the largest code."""
    for m, k in ((3, 320), (20, 136), (70, 77)):
        x, weight = random_int8(m, k, 0, device), random_int8(70, k, 1, device)
        expected = product(x, weight)
        memory = torch.full((offset + 70 * (k + gap),), 127, dtype=INT8, device=device)
        view = memory[offset:].view(70, k + gap)[:, :k]
        view.copy_(weight)
        assert_equal(product(x, view), expected)
        # x is made contiguous, and starts anywhere all the same.
        memory = torch.full((offset + m * k,), 127, dtype=INT8, device=device)
        x_view = memory[offset:].view(m, k)
        x_view.copy_(x)
        assert_equal(product(x_view, weight), expected)


@both_widths
@pytest.mark.parametrize("value", [0.0, INF, NAN, -1.0])
def test_scales_that_are_no_scales_reach_their_outputs_alone(
    value: float, out_dtype: torch.dtype, device: str
) -> None:
    args, kwargs = Int8GemmCase(5, 304, 208, out_dtype=out_dtype, bias=True).make(device)
    expected = int8_gemm(*args, **kwargs)
    args[1][3], args[3][1] = value, value
    found = int8_gemm(*args, **kwargs)
    assert_equal(found, int8_gemm_ref(*args, **kwargs))
    kept = torch.ones_like(expected, dtype=torch.bool)
    kept[3] = kept[:, 1] = False
    assert_equal(found[kept], expected[kept])


def test_scales_and_zeros_of_one_element_are_for_all(device: str) -> None:
    x, weight = random_int8(5, 200, 0, device), random_int8(130, 200, 1, device)
    zero, scale = torch.tensor(-37, dtype=INT8, device=device), torch.tensor(0.3, device=device)
    expected = int8_gemm(
        x,
        scale.expand(5, 1),
        weight,
        scale.expand(130, 1),
        None,
        zero.expand(5, 1),
        out_dtype=FP32,
    )
    for shape in ((), (1,), (1, 1), (1, 1, 1)):
        one, zeros = scale.view(shape), zero.view(shape)
        found = int8_gemm(x, one, weight, one, None, zeros, out_dtype=FP32)
        assert_equal(found, expected)
        assert_equal(int8_gemm_ref(x, one, weight, one, None, zeros, out_dtype=FP32), expected)


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
    (2000, 8200, 1040),
    (2049, 5000, 2064),
    (4100, 1032, 400),
]


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [FP32, BF16, HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zeros_per", [None, "row"])
@pytest.mark.parametrize(("m", "n", "k"), SMALL + LARGE)
def test_tiles_of_the_gpu(
    m: int, n: int, k: int, zeros_per: str | None, out_dtype: torch.dtype
) -> None:
    case = Int8GemmCase(m, n, k, out_dtype=out_dtype, bias=True, zeros_per=zeros_per)
    args, kwargs = case.make("cuda")
    assert_equal(int8_gemm(*args, **kwargs), case.reference(*args, **kwargs))


@pytest.mark.gpu
@both_widths
def test_results_repeat_to_the_bit(out_dtype: torch.dtype) -> None:
    """Between other kernels, so that launches that start early meet them."""
    for m, n, k in SMALL + LARGE:
        args, kwargs = Int8GemmCase(m, n, k, out_dtype=out_dtype).make("cuda")
        first = int8_gemm(*args, **kwargs)
        for _ in range(20):
            args[0].add_(0)
            assert_equal(int8_gemm(*args, **kwargs), first)


@pytest.mark.gpu
@pytest.mark.parametrize("zeros_per", [None, "row"])
def test_last_round_of_large_tiles(zeros_per: str | None) -> None:
    """Of 137 tiles of 256 tokens a CTA each takes 120, and clusters share the others."""
    case = Int8GemmCase(129, 17536, 4096, bias=True, zeros_per=zeros_per)
    args, kwargs = case.make("cuda")
    expected = case.reference(*args, **kwargs)
    for _ in range(20):
        assert_equal(int8_gemm(*args, **kwargs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1368, 1376])
@pytest.mark.parametrize("m", [0, 1, 20, 300])
@pytest.mark.parametrize("zeros_per", [None, "row"])
def test_captured_as_the_very_first_call_and_repeatable(
    zeros_per: str | None, m: int, k: int
) -> None:
    """One K that TMA does not read, and one that it does."""
    args, kwargs = Int8GemmCase(m, 520, k, zeros_per=zeros_per).make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = int8_gemm(*args, **kwargs)
    args[0].copy_(random_int8(m, k, 5))
    for _ in range(100):
        graph.replay()
        assert_equal(out, int8_gemm(*args, **kwargs))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """A weight of more than 2^32 bytes, of which rows at both ends are looked at."""
    n, k = 2**17 + 64, 2**15
    weight = torch.zeros(n, k, dtype=INT8, device="cuda")
    weight[-3:] = 1
    out = product(torch.ones(2, k, dtype=INT8, device="cuda"), weight)
    assert out[:, -3:].eq(k).all()
    assert out[:, :-3].eq(0).all()


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(6, 320)}, "x must be int8, got float32"),
    ({"x": torch.ones(6, 320, dtype=torch.uint8)}, "x must be int8, got uint8"),
    ({"x": torch.ones((), dtype=INT8)}, r"x must be \[\.\.\., K\], got a scalar"),
    (
        {"x_scales": torch.ones(6, 2)},
        r"x_scales must have one element, or be \[\.\.\., 1\] for x \[\.\.\., K\] = \[6, 320\], "
        r"got \[6, 2\]",
    ),
    ({"x_scales": torch.ones(5, 1)}, r"x_scales must have one element, .*, got \[5, 1\]"),
    ({"x_scales": torch.ones(6)}, r"x_scales must have one element, .*, got \[6\]"),
    ({"x_scales": torch.ones(6, 1, dtype=torch.int32)}, "x_scales must be float16, .*, got int32"),
    (
        {"weight": torch.ones(200, 319, dtype=INT8)},
        r"weight must be \[N, K\] = \[200, 320\], got",
    ),
    ({"weight": torch.ones(200, 320)}, "weight must be int8, got float32"),
    ({"weight": torch.ones(320, 200, dtype=INT8).T}, "weight must have stride 1 in its last"),
    (
        {"w_scales": torch.ones(199, 1)},
        r"w_scales must have one element, or be \[N, 1\] = \[200, 1\], got \[199, 1\]",
    ),
    ({"w_scales": torch.ones(200)}, r"w_scales must have one element, .*, got \[200\]"),
    ({"bias": torch.ones(199)}, r"bias must be \[N\] = \[200\], got \[199\]"),
    ({"x_zeros": torch.ones(6, 1)}, "x_zeros must be int8, got float32"),
    ({"x_zeros": torch.ones(6, dtype=INT8)}, r"x_zeros must have one element, .*, got \[6\]"),
    ({"w_sums": torch.ones(200)}, "w_sums must be int32, got float32"),
    ({"w_sums": torch.ones(2).int()}, r"w_sums must be \[N\] = \[200\], got \[2\]"),
    (
        {"w_sums": torch.ones(200).int(), "x_zeros": None},
        "w_sums must be None without x_zeros, got a tensor",
    ),
    ({"out_dtype": torch.float64}, "out_dtype must be float16, bfloat16 or float32, got another"),
    ({"out_dtype": INT8}, "out_dtype must be float16, bfloat16 or float32, got int8"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors(wrong: dict[str, Any], message: str, device: str) -> None:
    args, kwargs = CASE.make(device)
    names = ("x", "x_scales", "weight", "w_scales", "bias", "x_zeros", "w_sums")
    arguments = dict(zip(names, args, strict=True)) | kwargs
    arguments |= {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in wrong.items()
    }
    with pytest.raises(RuntimeError, match=f"effllm::int8_gemm: {message}"):
        int8_gemm(**arguments)


@pytest.mark.parametrize(
    ("k", "zeros", "message"),
    [(131072, False, "K must be at most 131071, so"), (65794, True, "K .* 65793 with x_zeros, so")],
)
def test_sums_that_could_overflow_are_refused(
    k: int, zeros: bool, message: str, device: str
) -> None:
    x, weight = torch.ones(1, k, dtype=INT8), torch.ones(8, k, dtype=INT8)
    zero = torch.zeros(1, dtype=INT8, device=device) if zeros else None
    with pytest.raises(RuntimeError, match=f"effllm::int8_gemm: {message}"):
        product(x.to(device), weight.to(device), zero)


@pytest.mark.gpu
def test_another_device_is_a_named_error() -> None:
    (x, x_scales, weight, w_scales, *_), kwargs = CASE.make("cuda")
    with pytest.raises(RuntimeError, match="w_scales must be on cuda:0 as x is, got cpu"):
        int8_gemm(x, x_scales, weight, w_scales.cpu(), **kwargs)
