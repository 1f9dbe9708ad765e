"""What the matmuls over packed 4-bit codes have in common, beyond the cases of the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import int4_gemm, int4_pack, lut4_gemm
from effllm.ops.int4_gemm import int4_gemm_ref
from effllm.ops.lut4_gemm import lut4_gemm_ref
from effllm.testing import hostile
from effllm.testing.cases.int4_gemm import Int4GemmCase
from effllm.testing.cases.lut4_gemm import Lut4GemmCase
from effllm.testing.compare import assert_close_to_reference, assert_equal

BF16, HALF = torch.bfloat16, torch.float16
LONG_K = 2112
"""So many columns, and few tokens, take a kernel of their own on Hopper."""


@dataclass(frozen=True)
class Variant:
    """An op and one kind of its weights. All five arguments are tensors, unless left out."""

    name: str
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    arguments: tuple[str, ...]

    def case(
        self,
        m: int,
        n: int,
        k: int,
        group_size: int = 64,
        dtype: torch.dtype = BF16,
        *,
        whole: bool = True,
        bias: bool = True,
    ) -> Int4GemmCase | Lut4GemmCase:
        """``whole``: with the argument that may be left out, zero points or scales."""
        if self.call is int4_gemm:
            return Int4GemmCase(m, n, k, group_size, dtype, whole, bias)
        return Lut4GemmCase(m, n, k, group_size, dtype, self.name[5:], whole, bias)


INT4 = Variant("int4", int4_gemm, int4_gemm_ref, ("x", "qweight", "scales", "zeros", "bias"))
LUT4 = [
    Variant(
        f"lut4-{codebook}", lut4_gemm, lut4_gemm_ref, ("x", "qweight", "codebook", "scales", "bias")
    )
    for codebook in ("tensor", "row", "group")
]
VARIANTS = [INT4, *LUT4]
EACH_OP = [INT4, LUT4[2]]

each_op = pytest.mark.parametrize("op", EACH_OP, ids=lambda op: op.name)
each_variant = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.name)


def check(op: Variant, case: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert_close_to_reference(
        op.call(*args, **kwargs),
        case.reference(*args, **kwargs),
        case.baseline(*args, **kwargs),
        cosine=True,
    )


@each_op
def test_leading_dimensions_of_x(op: Variant, device: str) -> None:
    (x, *weights), kwargs = op.case(6, 72, 192).make(device)
    expected = op.call(x, *weights, **kwargs)
    assert_equal(op.call(x.view(2, 3, 192), *weights, **kwargs), expected.view(2, 3, 72))
    assert_equal(op.call(x[0], *weights, **kwargs), expected[0])
    assert op.call(x.view(1, 6, 192)[:, :0], *weights, **kwargs).shape == (1, 0, 72)


@each_variant
@pytest.mark.parametrize("index", [0, 2, 3, 4])
@pytest.mark.parametrize("k", [192, LONG_K])
def test_any_strides(op: Variant, index: int, k: int, device: str) -> None:
    for dtype in (HALF, BF16):
        args, kwargs = op.case(6, 72, k, 64, dtype).make(device)
        for name, tensor in hostile.odd_strides(args[index]):
            strided, dense = list(args), list(args)
            strided[index], dense[index] = tensor, tensor.contiguous()
            result = op.call(*strided, **kwargs)
            assert_equal(result, op.call(*dense, **kwargs), name=f"{op.arguments[index]}: {name}")


@each_op
@pytest.mark.parametrize("k", [256, 2 * LONG_K])
def test_slices_along_k_add_up(op: Variant, k: int, device: str) -> None:
    """Row-parallel sharding: two strided slices of one packed weight, each with its tables."""
    case = op.case(4, 64, k, bias=False)
    args, kwargs = case.make(device)

    def slice_of(tensor: Tensor, half: int) -> Tensor:
        size = tensor.shape[1] // 2
        return tensor[:, size * half : size * (half + 1)]

    halves = [
        op.call(*[None if arg is None else slice_of(arg, half) for arg in args], **kwargs).double()
        for half in range(2)
    ]
    whole, baseline = case.reference(*args, **kwargs), case.baseline(*args, **kwargs)
    assert_close_to_reference(sum(halves, torch.zeros(())), whole, baseline, dtype=BF16)


@each_op
@pytest.mark.parametrize("k", [192, LONG_K])
def test_bias_is_added_once_and_exactly(op: Variant, k: int, device: str) -> None:
    (x, *weights), kwargs = op.case(6, 72, k).make(device)
    out = op.call(torch.zeros_like(x), *weights, **kwargs)
    assert_equal(out, weights[-1].expand_as(out).contiguous())


@each_op
def test_large_values_neither_overflow_inside_nor_are_hidden(op: Variant, device: str) -> None:
    """Partial sums go beyond fp16's 65504 and come back; what stays beyond is inf."""
    case = op.case(2, 64, 128, 64, HALF, whole=False, bias=False)
    args, kwargs = case.make(device)
    x = args[0]
    x[0] = 60000.0
    x[0, 64:] = -60000.0
    check(op, case, args, kwargs)
    x[1] = 60000.0
    assert op.call(*args, **kwargs)[1].isinf().any()


@each_variant
@pytest.mark.parametrize(("m", "k"), [(4, 64), (9, 64), (4, LONG_K), (20, 1024)])
def test_nan_of_one_token_stays_in_its_row(op: Variant, m: int, k: int, device: str) -> None:
    (x, *weights), kwargs = op.case(m, 64, k).make(device)
    clean = op.call(x, *weights, **kwargs)
    x[3] = float("nan")
    out = op.call(x, *weights, **kwargs)
    assert out[3].isnan().all()
    others = [row for row in range(m) if row != 3]
    assert_equal(out[others], clean[others])


@each_op
@pytest.mark.parametrize(("m", "n", "k"), [(16, 128, 1024), (100, 520, 2048), (5, 4232, LONG_K)])
def test_repeatable_to_the_bit(op: Variant, m: int, n: int, k: int, device: str) -> None:
    args, kwargs = op.case(m, n, k).make(device)
    first = op.call(*args, **kwargs)
    for _ in range(100 if device == "cuda" else 5):
        assert_equal(op.call(*args, **kwargs), first)


@each_variant
@pytest.mark.parametrize("whole", [False, True])
def test_gradient_of_x_and_bias_is_the_dense_one(op: Variant, whole: bool, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else BF16
    args, kwargs = op.case(5, 72, 200, 64, dtype, whole=whole).make(device)
    x, *weights, bias = args
    eye = torch.eye(200, dtype=torch.float64, device=device)
    weight = op.reference(eye, *weights, **kwargs).T[:72]
    x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(5, 72, device=device, dtype=dtype)
    op.call(*args, **kwargs).backward(grad)
    assert_close_to_reference(x.grad, grad.double() @ weight, grad @ weight.to(dtype))
    assert_close_to_reference(bias.grad, grad.double().sum(0), grad.sum(0))
    # The gradient of .sum() is an expanded scalar, with strides 0.
    x.grad = None
    op.call(*args, **kwargs).sum().backward()
    ones = torch.ones_like(grad)
    assert_close_to_reference(x.grad, ones.double() @ weight, ones @ weight.to(dtype))


@pytest.mark.parametrize(("op", "index"), [(INT4, 2), (LUT4[2], 2), (LUT4[2], 3)])
def test_gradient_of_the_weight_is_refused(op: Variant, index: int, device: str) -> None:
    args, kwargs = op.case(6, 72, 192).make(device)
    args[index].requires_grad_()
    message = f"{op.call.__name__}: {op.arguments[index]} must not require a gradient"
    with pytest.raises(RuntimeError, match=message):
        op.call(*args, **kwargs)


ERRORS = [
    (0, torch.ones(6, 192, dtype=torch.int32), r"x must be float16.* got int32"),
    (0, torch.ones(()), r"x must be \[\.\.\., K\], got a scalar"),
    (1, torch.zeros(2, 1536), r"qweight must be int32, got float32"),
    (
        1,
        torch.zeros(1, 1536, dtype=torch.int32),
        r"qweight must be \[ceil\(N/64\), ceil\(K/64\)\*512\] = \[2, 1536\], got \[1, 1536\]",
    ),
    (
        1,
        torch.zeros(1536, 2, dtype=torch.int32).T,
        r"qweight must have stride 1 in its last dimension, got strides \[1, 2\]",
    ),
    (
        1,
        torch.zeros(2 * 1536 + 1, dtype=torch.int32)[1:].view(2, 1536),
        r"qweight must have rows that start at multiples of 16 bytes",
    ),
    (
        "scales",
        torch.ones(72, 3, dtype=torch.float64),
        r"scales must be float16.*, got another dtype",
    ),
    ("scales", torch.ones(72, 4), r"scales must be \[N, ceil\(K/g\)\] = \[72, 3\], got \[72, 4\]"),
    ("scales", torch.ones(72), r"scales must be \[N, ceil\(K/g\)\] = .*, got \[72\]"),
    (4, torch.ones(71), r"bias must be \[N\] = \[72\], got \[71\]"),
    (4, torch.ones(72, dtype=torch.int32), r"bias must be float16.*, got int32"),
]


@each_op
@pytest.mark.parametrize(("index", "wrong", "message"), ERRORS)
def test_errors(op: Variant, index: int | str, wrong: Tensor, message: str, device: str) -> None:
    # `.to` makes its copies aligned and dense, which two of the cases are about.
    if device == "cuda" and "rows that start" in message:
        wrong = torch.zeros(2 * 1536 + 1, dtype=torch.int32, device=device)[1:].view(2, 1536)
    args = list(op.case(6, 72, 192, 64, HALF).make(device)[0])
    args[op.arguments.index(index) if isinstance(index, str) else index] = wrong.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::{op.call.__name__}: {message}"):
        op.call(*args, group_size=64)


@each_op
@pytest.mark.parametrize("group_size", [0, -1, 16, 96, 256])
def test_group_size_errors(op: Variant, group_size: int, device: str) -> None:
    args, _ = op.case(6, 72, 192).make(device)
    message = f"group_size must be 32, 64, 128 or K = 192, got {group_size}"
    with pytest.raises(RuntimeError, match=message):
        op.call(*args, group_size=group_size)


@pytest.mark.gpu
@each_op
def test_fp32_on_the_gpu_is_a_named_error(op: Variant) -> None:
    (x, *weights), kwargs = op.case(6, 72, 192).make("cuda")
    with pytest.raises(RuntimeError, match="x must be float16 or bfloat16, got float32"):
        op.call(x.float(), *weights, **kwargs)


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_mixed_devices_are_a_named_error(op: Variant, index: int) -> None:
    args, kwargs = op.case(6, 72, 192).make("cuda")
    moved = [arg.cpu() if i == index else arg for i, arg in enumerate(args)]
    with pytest.raises(RuntimeError, match=r"must be on (cpu|cuda:0) as x is, got (cpu|cuda:0)"):
        op.call(*moved, **kwargs)


@pytest.mark.gpu
@each_variant
@pytest.mark.parametrize("k", [333, 1024, LONG_K])
@pytest.mark.parametrize("m", [0, 1, 20, 200])
def test_captured_as_the_very_first_call_and_replayed_with_other_data(
    op: Variant, m: int, k: int
) -> None:
    (x, *weights), kwargs = op.case(m, 192, k).make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.call(x, *weights, **kwargs)
    x.copy_(hostile.normal(m, k, dtype=x.dtype, seed=5))
    graph.replay()
    assert_equal(out, op.call(x, *weights, **kwargs))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16, 40])
@pytest.mark.parametrize("op", [INT4, LUT4[1]], ids=lambda op: op.name)
def test_launches_that_start_early_see_what_comes_before_them(op: Variant, m: int) -> None:
    """Each multiplies what the one before has written, by codes that were packed just before."""
    n = 2048
    codes = torch.randint(16, (n, n), dtype=torch.uint8, device="cuda")
    other = 15 - codes
    scales = torch.full((n, n // 128), 1 / 256, dtype=BF16, device="cuda")
    table = (torch.arange(16, device="cuda") - 8).to(BF16).repeat(n, 1)
    tables = (scales, None) if op is INT4 else (table, scales)
    first = hostile.normal(m, n, dtype=BF16, seed=2).to("cuda")

    def chain(wait: bool) -> list[Tensor]:
        x, results = first.clone(), []
        for i in range(12):
            qweight = int4_pack(codes if i % 3 else other)
            for _ in range(3):
                if wait:
                    torch.cuda.synchronize()
                x = op.call(x, qweight, *tables, group_size=128)
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
@each_op
@pytest.mark.parametrize("k", [64, LONG_K])
def test_runs_on_the_current_stream(op: Variant, k: int) -> None:
    (x, *weights), kwargs = op.case(8, 64, k).make("cuda")
    expected = op.call(x, *weights, **kwargs)
    source, late = x.clone(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(source)
        out = op.call(late, *weights, **kwargs)
    torch.cuda.synchronize()
    assert_equal(out, expected)
