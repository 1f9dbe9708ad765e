"""fp8_gemm beyond the cases of the contract: every code, layouts, special values, accuracy over
long K, graphs, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import fp8_gemm, fp8_quantize, fp8_quantize_tensor
from effllm.ops.fp8_gemm import dequantize_weight, fp8_gemm_ref
from effllm.testing import hostile
from effllm.testing.cases.fp8_gemm import (
    PAIRS,
    Fp8GemmCase,
    QuantizedFp8GemmCase,
    quantize_and_multiply,
    random_codes,
)
from effllm.testing.compare import assert_close_to_reference, assert_equal
from effllm.testing.run import check_values

HALF, BF16, FP32, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
INF, NAN = math.inf, math.nan
every_pair = pytest.mark.parametrize(("x_per", "w_per"), PAIRS)
# Where sums shall be fp32 to the end they come from another kernel than on Hopper's tensor cores.
both_kernels = pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
CASE = Fp8GemmCase(6, 200, 320, "group", "block", FP32, bias=True)


def odd_strides(codes: Tensor) -> list[tuple[str, Tensor]]:
    """hostile.odd_strides of e4m3: gaps hold the code NaN."""
    views = hostile.odd_strides(codes.view(torch.uint8))
    return [(name, view.view(E4M3)) for name, view in views]


@pytest.mark.parametrize("m", [1, 9, 40])
def test_every_code_is_exact(m: int, device: str) -> None:
    """One product per output: code times code, as float64 has it."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).to(device)
    one = torch.ones(1, device=device)
    weight = codes.unsqueeze(1)
    for first in range(0, 256, m):
        x = codes[first : first + m].unsqueeze(1)
        out = fp8_gemm(x, one, weight, one, out_dtype=FP32)
        exact = x.double() @ weight.double().T
        assert_equal(out.double(), exact)
    assert out.isnan().any()


@every_pair
def test_results_on_the_cpu_do_not_depend_on_the_batch(x_per: str, w_per: str) -> None:
    (x, x_scales, weight, w_scales, _), kwargs = Fp8GemmCase(70, 90, 300, x_per, w_per).make("cpu")
    together = fp8_gemm(x, x_scales, weight, w_scales, **kwargs)
    for m in (0, 3, 69):
        scales = x_scales if x_per == "tensor" else x_scales[m : m + 1]
        alone = fp8_gemm(x[m : m + 1], scales, weight, w_scales, **kwargs)
        assert_equal(alone, together[m : m + 1])


@pytest.mark.parametrize("pair", [("row", "row"), ("group", "block")])
@pytest.mark.parametrize("m", [1, 33])
def test_behind_fp8_quantize(m: int, pair: tuple[str, str], device: str) -> None:
    case = QuantizedFp8GemmCase(m, 208, 384, *pair, bias=True)
    check_values(quantize_and_multiply, case, device)
    args, options = case.make(device)
    out = quantize_and_multiply(*args, **options)
    others = case.prepare_others(*args, **options)
    assert_equal(others["fp8_gemm alone"](), out)


@pytest.mark.gpu
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_agrees_with_cublaslt(per: str) -> None:
    """What benchmarks time beside ours is the same product."""
    case = Fp8GemmCase(64, 256, 512, per, per)
    args, options = case.make("cuda")
    scaled_mm = case.prepare_others(*args, **options)["torch._scaled_mm"]
    try:
        result = scaled_mm().float()
    except RuntimeError as error:
        pytest.skip(f"this torch or GPU has no such kernel: {error}")
    out = fp8_gemm(*args, **options).float()
    assert (result - out).abs().max() <= 2e-2 * out.abs().max()


def test_leading_dimensions_and_strides(device: str) -> None:
    (x, x_scales, weight, w_scales, bias), kwargs = CASE.make(device)
    expected = fp8_gemm(x, x_scales, weight, w_scales, bias, **kwargs)
    cubic = fp8_gemm(x.view(2, 3, 320), x_scales.view(2, 3, 3), weight, w_scales, bias, **kwargs)
    assert_equal(cubic, expected.view(2, 3, 200))
    # Leading dimensions that no single stride steps through.
    crossed = x_scales.view(2, 3, 3).transpose(0, 1).contiguous().transpose(0, 1)
    cubic = fp8_gemm(x.view(2, 3, 320), crossed, weight, w_scales, bias, **kwargs)
    assert_equal(cubic, expected.view(2, 3, 200))
    single = fp8_gemm(x[1], x_scales[1], weight, w_scales, bias, **kwargs)
    pair = fp8_gemm(x[1:2], x_scales[1:2], weight, w_scales, bias, **kwargs)
    assert_equal(single, pair[0])

    for name, view in odd_strides(x):
        found = fp8_gemm(view, x_scales, weight, w_scales, bias, **kwargs)
        wanted = fp8_gemm(view.contiguous(), x_scales, weight, w_scales, bias, **kwargs)
        assert_equal(found, wanted, name=f"x {name}")
    for position, tensor in ((1, x_scales), (3, w_scales), (4, bias)):
        for name, view in hostile.odd_strides(tensor):
            args = [x, x_scales, weight, w_scales, bias]
            args[position] = view
            found = fp8_gemm(*args, **kwargs)
            args[position] = view.contiguous()
            assert_equal(found, fp8_gemm(*args, **kwargs), name=f"argument {position} {name}")


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 7, 8, 12])
@pytest.mark.parametrize("gap", [0, 1, 4, 16])
def test_weights_anywhere_in_memory(offset: int, gap: int, device: str) -> None:
    """Rows at any address and any distance; what lies between them is the code NaN."""
    for m, k in ((3, 320), (20, 136), (70, 77)):
        (x, x_scales, weight, w_scales, _), kwargs = Fp8GemmCase(m, 70, k, out_dtype=FP32).make(
            device
        )
        memory = torch.full((offset + 70 * (k + gap),), 0x7F, dtype=torch.uint8, device=device)
        view = memory[offset:].view(70, k + gap)[:, :k]
        view.copy_(weight.view(torch.uint8))
        expected = fp8_gemm(x, x_scales, weight, w_scales, **kwargs)
        assert_equal(fp8_gemm(x, x_scales, view.view(E4M3), w_scales, **kwargs), expected)
        # x is made contiguous, and starts anywhere all the same.
        memory = torch.full((offset + m * k,), 0x7F, dtype=torch.uint8, device=device)
        x_view = memory[offset:].view(m, k)
        x_view.copy_(x.view(torch.uint8))
        assert_equal(fp8_gemm(x_view.view(E4M3), x_scales, weight, w_scales, **kwargs), expected)


@both_kernels
@every_pair
def test_nan_codes_reach_their_outputs_alone(
    x_per: str, w_per: str, out_dtype: torch.dtype, device: str
) -> None:
    args, kwargs = Fp8GemmCase(11, 152, 272, x_per, w_per, out_dtype).make(device)
    expected = fp8_gemm(*args, **kwargs)
    assert not expected.isnan().any()
    args[0].view(torch.uint8)[4, 271] = 0x7F
    args[2].view(torch.uint8)[140, 5] = 0xFF
    found = fp8_gemm(*args, **kwargs)
    expected[4] = expected[:, 140] = NAN
    assert_equal(found, expected)


@both_kernels
@pytest.mark.parametrize("value", [0.0, INF, NAN, -1.0])
def test_scales_that_are_no_scales_reach_their_outputs_alone(
    value: float, out_dtype: torch.dtype, device: str
) -> None:
    for x_per, w_per in (("row", "row"), ("group", "block")):
        (x, x_scales, weight, w_scales, _), kwargs = Fp8GemmCase(
            5, 304, 208, x_per, w_per, out_dtype
        ).make(device)
        # Where all products are 1 sums are plain numbers, and infinity of them infinity.
        x, weight = (torch.full_like(t.float(), 1.0).to(E4M3) for t in (x, weight))
        expected = fp8_gemm(x, x_scales, weight, w_scales, **kwargs)
        x_scales[3], w_scales[1] = value, value
        found = fp8_gemm(x, x_scales, weight, w_scales, **kwargs)
        rows = slice(1, 2) if w_per == "row" else slice(128, 256)
        exact = fp8_gemm_ref(x, x_scales, weight, w_scales, **kwargs)
        assert_close_to_reference(found, exact, exact.to(out_dtype))
        kept = torch.ones_like(expected, dtype=torch.bool)
        kept[3] = kept[:, rows] = False
        assert_equal(found[kept], expected[kept])


def test_scales_of_one_element_are_for_all(device: str) -> None:
    (x, x_scales, weight, w_scales, _), kwargs = Fp8GemmCase(
        5, 130, 200, "tensor", "tensor", FP32
    ).make(device)
    expected = fp8_gemm(x, x_scales.expand(5, 1), weight, w_scales.expand(130, 1), **kwargs)
    for shape in ((), (1,), (1, 1)):
        found = fp8_gemm(x, x_scales.view(shape), weight, w_scales.view(shape), **kwargs)
        assert_equal(found, expected)


def with_outliers(rows: int, k: int, seed: int) -> Tensor:
    """Off-centre, so that sums grow with K, and some columns a hundred times the others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=generator) + 0.3
    columns = torch.randperm(k, generator=generator)[: k // 512]
    values[:, columns] *= 100
    return values


@pytest.mark.parametrize("m", [4, 16, 64])
@pytest.mark.parametrize("per", ["tensor", "row", "block"])
@both_kernels
def test_long_sums_with_outliers_are_as_good_as_fp32(
    m: int, per: str, out_dtype: torch.dtype, device: str
) -> None:
    """Sums that keep about 14 bits, as those of fp8 tensor cores, miss this by far in fp32; in
    bf16 they would if they were of more than some columns."""
    n, k = 48, 16384
    x, weight = with_outliers(m, k, 0).to(device), with_outliers(n, k, 1).to(device)
    if per == "tensor":
        (xq, x_scales), (codes, w_scales) = fp8_quantize_tensor(x), fp8_quantize_tensor(weight)
    elif per == "row":
        (xq, x_scales), (codes, w_scales) = fp8_quantize(x), fp8_quantize(weight)
    else:
        xq, x_scales = fp8_quantize(x, group_size=128)
        codes, row_scales = fp8_quantize(weight, group_size=128)
        w_scales = row_scales[:1].contiguous()  # any will do: the codes are what they are
    found = fp8_gemm(xq, x_scales, codes, w_scales, out_dtype=out_dtype)
    exact = fp8_gemm_ref(xq, x_scales, codes, w_scales, out_dtype=out_dtype)
    # Term after term in fp32: the plainest sum there is.
    per_group = x_scales.float().expand(m, -1).repeat_interleave(k // x_scales.shape[-1], -1)
    terms_x = xq.float() * per_group
    terms_w = dequantize_weight(codes, w_scales)
    plain = torch.zeros(m, n, device=device)
    for column in range(k):
        plain += terms_x[:, column, None] * terms_w[:, column]
    error = (found.double() - exact).abs()
    plain_error = (plain.to(out_dtype).double() - exact).abs()
    assert error.max() <= 1.5 * plain_error.max()
    assert error.square().mean() <= 1.5**2 * plain_error.square().mean()


@pytest.mark.parametrize(("m", "n", "k"), [(6, 200, 320), (70, 256, 1024), (3, 64, 16384)])
@every_pair
def test_fast_sums_lose_less_than_bf16_does(
    x_per: str, w_per: str, m: int, n: int, k: int, device: str
) -> None:
    """In fp32, where nothing else is lost: what the tensor cores drop of sums of all columns."""
    case = Fp8GemmCase(m, n, k, x_per, w_per, FP32, bias=True)
    args, kwargs = case.make(device)
    exact, plain = case.reference(*args, **kwargs), case.baseline(*args, **kwargs)
    fast = fp8_gemm(*args, **kwargs, accurate=False)
    assert_close_to_reference(fast, exact, plain, dtype=BF16)


# Every tile of the Hopper kernel, with whole, split and half-empty ones of them.
LARGE = [(257, 1024, 640), (700, 3072, 528), (2050, 4096, 256), (4100, 1032, 400), (1024, 576, 896)]


@pytest.mark.gpu
@pytest.mark.parametrize("accurate", [True, False], ids=["accurate", "fast"])
@pytest.mark.parametrize(("m", "n", "k"), LARGE)
@every_pair
def test_large_problems(x_per: str, w_per: str, m: int, n: int, k: int, accurate: bool) -> None:
    case = Fp8GemmCase(m, n, k, x_per, w_per, HALF, bias=True)
    args, kwargs = case.make("cuda")
    found = fp8_gemm(*args, **kwargs, accurate=accurate)
    exact, plain = case.reference(*args, **kwargs), case.baseline(*args, **kwargs)
    assert_close_to_reference(found, exact, plain, dtype=HALF if accurate else BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("accurate", [True, False], ids=["accurate", "fast"])
@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_results_repeat_to_the_bit(out_dtype: torch.dtype, accurate: bool) -> None:
    """Between other kernels, so that launches that start early meet them."""
    for m, n, k in ((1, 4096, 4096), (33, 576, 7168), (64, 2112, 2048), *LARGE):
        for pair in (("row", "row"), ("group", "block")):
            args, kwargs = Fp8GemmCase(m, n, k, *pair, out_dtype).make("cuda")
            first = fp8_gemm(*args, **kwargs, accurate=accurate)
            for _ in range(20):
                args[0].view(torch.uint8).add_(0)
                assert_equal(fp8_gemm(*args, **kwargs, accurate=accurate), first)


@pytest.mark.gpu
@pytest.mark.parametrize(("accurate", "m", "n"), [(True, 400, 25472), (False, 700, 17152)])
def test_last_round_of_large_tiles(accurate: bool, m: int, n: int) -> None:
    """Three rounds of pairs of CTAs, and a few pairs of tiles left over."""
    case = Fp8GemmCase(m, n, 4096, "row", "row", BF16, bias=True)
    args, kwargs = case.make("cuda")
    first = fp8_gemm(*args, **kwargs, accurate=accurate)
    exact, plain = case.reference(*args, **kwargs), case.baseline(*args, **kwargs)
    assert_close_to_reference(first, exact, plain, dtype=BF16)
    for _ in range(20):
        assert_equal(fp8_gemm(*args, **kwargs, accurate=accurate), first)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 700])
def test_scales_of_x_in_any_layout(m: int) -> None:
    """Kernels read one layout; others are copied into it."""
    args, kwargs = Fp8GemmCase(m, 256, 640, "group", "block").make("cuda")
    expected = fp8_gemm(*args, **kwargs)
    for scales in (args[1].contiguous(), args[1].T.contiguous().T):
        assert_equal(fp8_gemm(args[0], scales, *args[2:], **kwargs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1368, 1376])
@pytest.mark.parametrize("m", [0, 1, 20, 300])
def test_captured_as_the_very_first_call_and_repeatable(m: int, k: int) -> None:
    """K = 1368, at which a peer failed only in a captured graph, and one that TMA reads."""
    args, kwargs = Fp8GemmCase(m, 520, k, "group", "block").make("cuda")
    x, x_scales, weight, w_scales, _ = args
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_gemm(x, x_scales, weight, w_scales, **kwargs)
    x.view(torch.uint8).copy_(random_codes(m, k, 5).view(torch.uint8))
    for _ in range(100):
        graph.replay()
        assert_equal(out, fp8_gemm(x, x_scales, weight, w_scales, **kwargs))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """A weight of more than 2^32 bytes, of which rows at both ends are looked at."""
    n, k = 2**17 + 64, 2**15
    weight = torch.zeros(n, k, dtype=torch.uint8, device="cuda")
    weight[-3:] = 0x38  # 1.0
    x = torch.full((2, k), 0x38, dtype=torch.uint8, device="cuda").view(E4M3)
    one = torch.ones(1, device="cuda")
    out = fp8_gemm(x, one, weight.view(E4M3), one, out_dtype=FP32)
    assert out[:, -3:].eq(k).all()
    assert out[:, :-3].eq(0).all()


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(6, 320)}, "x must be float8_e4m3fn, got float32"),
    ({"x": torch.ones(()).to(E4M3)}, r"x must be \[\.\.\., K\], got a scalar"),
    (
        {"x_scales": torch.ones(6, 2)},
        r"x_scales must have one element, or be \[\.\.\., 1\] or \[\.\.\., ceil\(K/128\)\] = "
        r"\[\.\.\., 3\] for x \[\.\.\., K\] = \[6, 320\], got \[6, 2\]",
    ),
    ({"x_scales": torch.ones(5, 1)}, r"x_scales must have one element, .*, got \[5, 1\]"),
    ({"x_scales": torch.ones(6)}, r"x_scales must have one element, .*, got \[6\]"),
    ({"x_scales": torch.ones(6, 1, dtype=torch.int32)}, "x_scales must be float16, .*, got int32"),
    ({"weight": torch.ones(200, 319).to(E4M3)}, r"weight must be \[N, K\] = \[200, 320\], got"),
    ({"weight": torch.ones(200, 320)}, "weight must be float8_e4m3fn, got float32"),
    ({"weight": torch.ones(320, 200).to(E4M3).T}, "weight must have stride 1 in its last"),
    (
        {"w_scales": torch.ones(3, 3)},
        r"w_scales must have one element, or be \[N, 1\] or \[ceil\(N/128\), ceil\(K/128\)\] = "
        r"\[200, 1\] or \[2, 3\], got \[3, 3\]",
    ),
    ({"w_scales": torch.ones(200)}, r"w_scales must have one element, .*, got \[200\]"),
    ({"bias": torch.ones(199)}, r"bias must be \[N\] = \[200\], got \[199\]"),
    ({"out_dtype": torch.float64}, "out_dtype must be float16, bfloat16 or float32, got another"),
    ({"out_dtype": torch.int8}, "out_dtype must be float16, bfloat16 or float32, got int8"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors(wrong: dict[str, Any], message: str, device: str) -> None:
    args, kwargs = CASE.make(device)
    names = ("x", "x_scales", "weight", "w_scales", "bias")
    arguments = dict(zip(names, args, strict=True)) | kwargs
    arguments |= {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in wrong.items()
    }
    with pytest.raises(RuntimeError, match=f"effllm::fp8_gemm: {message}"):
        fp8_gemm(**arguments)


@pytest.mark.gpu
def test_another_device_is_a_named_error() -> None:
    (x, x_scales, weight, w_scales, _), kwargs = CASE.make("cuda")
    with pytest.raises(RuntimeError, match="w_scales must be on cuda:0 as x is, got cpu"):
        fp8_gemm(x, x_scales, weight, w_scales.cpu(), **kwargs)
