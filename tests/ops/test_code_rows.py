"""The GPU kernels that quantise rows, also such as they make first, proved without a GPU: their own
headers, on lanes that take turns, against the ops on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm.ops import (
    add_rms_norm_fp8_quantize,
    add_rms_norm_int8_quantize,
    fp8_quantize,
    fp8_quantize_tensor,
    int8_quantize,
    int8_quantize_asymmetric,
    rms_norm_fp8_quantize,
    rms_norm_int8_quantize,
    silu_mul_fp8_quantize,
    silu_mul_int8_quantize,
)
from effllm.ops.fp8_quantize import empty_scales
from effllm.ops.silu_mul_fp8_quantize import silu_ref
from effllm.testing import hostile
from effllm.testing.cases import (
    add_rms_norm_fp8_quantize as add_cases,
)
from effllm.testing.cases import (
    add_rms_norm_int8_quantize as add_int8_cases,
)
from effllm.testing.cases import (
    fp8_quantize as quantize_cases,
)
from effllm.testing.cases import (
    int8_quantize as int8_cases,
)
from effllm.testing.cases import (
    int8_quantize_asymmetric as asymmetric_cases,
)
from effllm.testing.cases import (
    rms_norm_fp8_quantize as norm_cases,
)
from effllm.testing.cases import (
    rms_norm_int8_quantize as norm_int8_cases,
)
from effllm.testing.cases import (
    silu_mul_fp8_quantize as silu_cases,
)
from effllm.testing.cases import (
    silu_mul_int8_quantize as silu_int8_cases,
)
from effllm.testing.compare import assert_equal

Results = tuple[Tensor, ...]
Kernel = Callable[..., tuple[Results, int]]
MAX_ROWS = 100
"""A block's turn takes milliseconds."""


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Outputs:
    """Results between canaries, as an op would allocate them."""

    def __init__(self, x: Tensor, scale: Tensor | None, group_size: int | None) -> None:
        groups = 1 if group_size is None else -(-x.shape[-1] // group_size)
        scales = empty_scales(x, groups) if scale is None else torch.empty(1)
        self.shape = scales.shape
        self.strides = scales.stride()
        count = scales.untyped_storage().nbytes() // 4
        self.codes, check_codes = hostile.guarded(torch.full(x.shape, 0x7F, dtype=torch.uint8))
        self.scales, check_scales = hostile.guarded(torch.full((count,), torch.nan))
        self.sum, check_sum = hostile.guarded(torch.full(x.shape, torch.nan, dtype=x.dtype))
        self.checks = (check_codes, check_scales, check_sum)

    def checked(self) -> Results:
        for check in self.checks:
            check()
        scales = self.scales.as_strided(self.shape, self.strides)
        return self.codes.view(torch.float8_e4m3fn), scales, self.sum


def as_codes(results: Results, kind: str) -> Results:
    codes, *others = results
    return (codes.view(torch.int8) if kind == "int8" else codes, *others)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("code_rows.cpp", tmp_path_factory.mktemp("code_rows"))


@pytest.fixture(scope="module")
def quantize(library: ctypes.CDLL) -> Kernel:
    """fp8_quantize as the GPU does it, and the slots of the kernel."""

    def call(x: Tensor, *, group_size: int | None) -> tuple[Results, int]:
        out = Outputs(x, None, group_size)
        slots = library.fp8_quantize_rows(
            (TensorArgument * 1)(as_argument(x)),
            ctypes.c_int64(-1 if group_size is None else group_size),
            pointer(out.codes),
            pointer(out.scales),
        )
        return out.checked()[:2], slots

    return call


@pytest.fixture(scope="module")
def quantize_int8(library: ctypes.CDLL) -> Kernel:
    """int8_quantize."""

    def call(x: Tensor, scale: Tensor | None = None) -> tuple[Results, int]:
        out = Outputs(x, scale, None)
        slots = library.int8_quantize_rows(
            (TensorArgument * 2)(as_argument(x), as_argument(scale)),
            pointer(out.codes),
            pointer(out.scales),
        )
        codes, scales, _ = out.checked()
        return (codes.view(torch.int8), scales), slots

    return call


@pytest.fixture(scope="module")
def quantize_asymmetric(library: ctypes.CDLL) -> Kernel:
    """int8_quantize_asymmetric."""

    def call(x: Tensor) -> tuple[Results, int]:
        out = Outputs(x, None, None)
        zeros, check_zeros = hostile.guarded(torch.full((*x.shape[:-1], 1), 99, dtype=torch.int8))
        slots = library.int8_quantize_asymmetric_rows(
            (TensorArgument * 1)(as_argument(x)),
            pointer(out.codes),
            pointer(out.scales),
            pointer(zeros),
        )
        check_zeros()
        codes, scales, _ = out.checked()
        return (codes.view(torch.int8), scales, zeros), slots

    return call


@pytest.fixture(scope="module")
def silu_mul(library: ctypes.CDLL) -> Kernel:
    """silu_mul_fp8_quantize, or of ``kind`` "int8" silu_mul_int8_quantize."""

    def call(
        gate: Tensor,
        up: Tensor,
        scale: Tensor | None = None,
        *,
        group_size: int | None = None,
        kind: str = "fp8",
    ) -> tuple[Results, int]:
        out = Outputs(gate, scale, group_size)
        slots = getattr(library, f"silu_mul_{kind}_rows")(
            (TensorArgument * 3)(*map(as_argument, (gate, up, scale))),
            ctypes.c_int64(-1 if group_size is None else group_size),
            pointer(out.codes),
            pointer(out.scales),
        )
        return as_codes(out.checked()[:2], kind), slots

    return call


@pytest.fixture(scope="module")
def add_rms_norm(library: ctypes.CDLL) -> Kernel:
    """add_rms_norm_fp8_quantize, or with None rms_norm_fp8_quantize; or of ``kind`` "int8"."""

    def call(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        scale: Tensor | None = None,
        *,
        eps: float,
        group_size: int | None = None,
        kind: str = "fp8",
    ) -> tuple[Results, int]:
        out = Outputs(x, scale, group_size)
        slots = getattr(library, f"rms_norm_{kind}_rows")(
            (TensorArgument * 4)(*map(as_argument, (x, residual, weight, scale))),
            ctypes.c_double(eps),
            ctypes.c_int64(-1 if group_size is None else group_size),
            pointer(out.codes),
            pointer(out.scales),
            pointer(None if residual is None else out.sum),
        )
        return as_codes(out.checked()[: 2 if residual is None else 3], kind), slots

    return call


def assert_same(found: Results, wanted: Results) -> None:
    for index, (tensor, expected) in enumerate(zip(found, wanted, strict=True)):
        if tensor.element_size() == 1:
            tensor, expected = tensor.view(torch.uint8), expected.view(torch.uint8)
        assert_equal(tensor, expected, name=f"result {index}")


def slots_of(k: int, dtype: torch.dtype, in_pieces: bool = False) -> int:
    """What rows of K elements should take, aligned."""
    if k % 8 != 0:
        return 0
    if in_pieces or k <= 8192:
        return 2
    if dtype == torch.float32 or k > 32768:
        return 0
    return 4 if k <= 16384 else 8


def small(cases: list[Any]) -> Any:
    chosen = [case for case in cases if case.m <= MAX_ROWS]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)


def codes_by(library: ctypes.CDLL, x: Tensor, scale: float, kind: str = "e4m3") -> Tensor:
    codes = torch.empty(x.shape, dtype=torch.uint8)
    count = ctypes.c_int64(x.numel())
    find_codes = getattr(library, f"{kind}_codes")
    find_codes(pointer(x), count, ctypes.c_float(scale), pointer(codes))
    return codes


def test_quotients_next_to_where_codes_change(library: ctypes.CDLL) -> None:
    """Scales whose multiples lie as near to the middle between two floats, beside that between two
    codes, as any do; and others."""
    near = [(j << 20) + r for j in range(8, 16) for r in range(-4, 5)]
    scales = torch.tensor([s for s in near if 2**23 <= s < 2**24], dtype=torch.float64) * 2.0**-27
    others = hostile.normal(300).abs() * 2.0 ** torch.linspace(-70, 70, 300)
    middles = torch.arange(16, 32) * 2.0 ** torch.arange(-14, 5)[:, None]
    steps = torch.arange(-3, 4) * 2.0**-24
    points = (middles.flatten()[:, None].double() * (1 + steps)).flatten()
    for scale in torch.cat([scales.float(), others]):
        x = (points * scale.double()).float()
        x = torch.cat([x, torch.nextafter(x, torch.zeros(()))])
        x = torch.cat([x, -x])
        wanted, _ = fp8_quantize_tensor(x, scale)
        assert_equal(codes_by(library, x, scale.item()), wanted.view(torch.uint8))


@pytest.mark.parametrize(
    "scale",
    [
        *(0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -0.3, 3e38, 1.7e-18),
        *(2.0**power for power in (-149, -61, -60, 60, 61)),
    ],
)
def test_quotients_of_special_values(scale: float, library: ctypes.CDLL) -> None:
    x = 2.0 ** torch.arange(-149.0, 128.0) * 1.3
    x = torch.cat([x, torch.tensor([0.0, torch.inf, torch.nan, torch.finfo(x.dtype).max])])
    x = torch.cat([x, -x])
    wanted, _ = fp8_quantize_tensor(x, torch.tensor(scale))
    assert_equal(codes_by(library, x, scale), wanted.view(torch.uint8))
    wanted, _ = int8_quantize(x, torch.tensor(scale))
    assert_equal(codes_by(library, x, scale, "int8"), wanted.view(torch.uint8))


def test_quotients_next_to_where_int8_codes_change(library: ctypes.CDLL) -> None:
    """Halves between codes, and floats beside them, by scales of every kind."""
    scales = hostile.normal(600).abs() * 2.0 ** torch.linspace(-70, 70, 600)
    middles = torch.arange(-129, 129) + 0.5
    steps = torch.arange(-3, 4) * 2.0**-24
    points = (middles[:, None].double() * (1 + steps)).flatten()
    for scale in scales:
        x = (points * scale.double()).float()
        wanted, _ = int8_quantize(x, scale)
        assert_equal(codes_by(library, x, scale.item(), "int8"), wanted.view(torch.uint8))


def test_silu_of_all_16_bit_numbers_and_others(library: ctypes.CDLL) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16)
    random = torch.linspace(-100, 100, 1_000_001)
    for g in (numbers.view(torch.float16).float(), numbers.view(torch.bfloat16).float(), random):
        values = torch.empty_like(g)
        library.silu_values(pointer(g), ctypes.c_int64(g.numel()), pointer(values))
        assert_equal(values, silu_ref(g))
        assert_equal(values.signbit(), silu_ref(g).signbit().where(~g.isnan(), values.signbit()))


@small(quantize_cases.CASES)
def test_quantize_is_that_of_the_cpu(case: Any, quantize: Kernel) -> None:
    args, options = case.make("cpu")
    found, slots = quantize(*args, **options)
    assert slots == slots_of(case.k, case.dtype, case.group_size is not None)
    assert_same(found, fp8_quantize(*args, **options))


@small(int8_cases.CASES)
def test_int8_quantize_is_that_of_the_cpu(case: Any, quantize_int8: Kernel) -> None:
    args, options = case.make("cpu")
    found, slots = quantize_int8(*args, **options)
    assert slots == slots_of(case.k, case.dtype, case.scale_dtype is not None)
    assert_same(found, int8_quantize(*args, **options))


@small(asymmetric_cases.CASES)
def test_asymmetric_is_that_of_the_cpu(case: Any, quantize_asymmetric: Kernel) -> None:
    (x,), _ = case.make("cpu")
    found, slots = quantize_asymmetric(x)
    assert slots == slots_of(case.k, case.dtype)
    assert_same(found, int8_quantize_asymmetric(x))


@small(silu_cases.CASES)
def test_silu_mul_is_that_of_the_cpu(case: Any, silu_mul: Kernel) -> None:
    args, options = case.make("cpu")
    found, slots = silu_mul(*args, **options)
    in_pieces = case.group_size is not None or case.scale_dtype is not None
    assert slots == slots_of(case.k, case.dtype, in_pieces)
    assert_same(found, silu_mul_fp8_quantize(*args, **options))


@small(norm_cases.CASES)
def test_rms_norm_is_that_of_the_cpu(case: Any, add_rms_norm: Kernel) -> None:
    (x, *others), options = case.make("cpu")
    found, slots = add_rms_norm(x, None, *others, **options)
    assert slots == (0 if case.gap % 8 else slots_of(case.k, case.dtype))
    assert_same(found, rms_norm_fp8_quantize(x, *others, **options))


@small(add_cases.CASES)
def test_add_rms_norm_is_that_of_the_cpu(case: Any, add_rms_norm: Kernel) -> None:
    args, options = case.make("cpu")
    found, slots = add_rms_norm(*args, **options)
    assert slots == (0 if case.gap % 8 else slots_of(case.k, case.dtype))
    assert_same(found, add_rms_norm_fp8_quantize(*args, **options))


@small(silu_int8_cases.CASES)
def test_silu_mul_int8_is_that_of_the_cpu(case: Any, silu_mul: Kernel) -> None:
    args, _ = case.make("cpu")
    found, slots = silu_mul(*args, kind="int8")
    assert slots == slots_of(case.k, case.dtype, case.scale_dtype is not None)
    assert_same(found, silu_mul_int8_quantize(*args))


@small(norm_int8_cases.CASES)
def test_rms_norm_int8_is_that_of_the_cpu(case: Any, add_rms_norm: Kernel) -> None:
    (x, *others), options = case.make("cpu")
    found, slots = add_rms_norm(x, None, *others, **options, kind="int8")
    assert slots == (0 if case.gap % 8 else slots_of(case.k, case.dtype))
    assert_same(found, rms_norm_int8_quantize(x, *others, **options))


@small(add_int8_cases.CASES)
def test_add_rms_norm_int8_is_that_of_the_cpu(case: Any, add_rms_norm: Kernel) -> None:
    args, options = case.make("cpu")
    found, slots = add_rms_norm(*args, **options, kind="int8")
    assert slots == (0 if case.gap % 8 else slots_of(case.k, case.dtype))
    assert_same(found, add_rms_norm_int8_quantize(*args, **options))


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_special_values(
    dtype: torch.dtype,
    group_size: int | None,
    quantize: Kernel,
    quantize_int8: Kernel,
    quantize_asymmetric: Kernel,
    silu_mul: Kernel,
    add_rms_norm: Kernel,
) -> None:
    """Every row has one: in each group that sees it, what the CPU says."""
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 44.0, 88.8, -88.8, -1e4]
    x = hostile.normal(len(special), 320, dtype=dtype)
    x[:, 130] = torch.tensor(special, dtype=dtype)
    x[5] = 0
    found, _ = quantize(x, group_size=group_size)
    assert_same(found, fp8_quantize(x, group_size=group_size))
    for scale in (None, torch.tensor([0.02]), torch.tensor([torch.nan])):
        found, _ = quantize_int8(x, scale)
        assert_same(found, int8_quantize(x, scale))
    for power in (1.0, 2.0**-60, 2.0**60, 2.0**-130):
        scaled = (x.float() * power).to(dtype)
        found, _ = quantize_asymmetric(scaled)
        assert_same(found, int8_quantize_asymmetric(scaled))
    up = hostile.normal(*x.shape, dtype=dtype, seed=1)
    found, _ = silu_mul(x, up, group_size=group_size)
    assert_same(found, silu_mul_fp8_quantize(x, up, group_size=group_size))
    found, _ = silu_mul(x, up, kind="int8")
    assert_same(found, silu_mul_int8_quantize(x, up))
    for eps in (0.0, 1e-6):
        args, options = (x, up, up[1]), {"eps": eps, "group_size": group_size}
        found, _ = add_rms_norm(*args, **options)
        assert_same(found, add_rms_norm_fp8_quantize(*args, **options))
        found, _ = add_rms_norm(x, None, up[1], **options)
        assert_same(found, rms_norm_fp8_quantize(x, up[1], **options))
        found, _ = add_rms_norm(*args, eps=eps, kind="int8")
        assert_same(found, add_rms_norm_int8_quantize(*args, eps=eps))


@pytest.mark.parametrize("group_size", [None, 128])
def test_unaligned_rows(
    group_size: int | None, quantize: Kernel, silu_mul: Kernel, add_rms_norm: Kernel
) -> None:
    """Each argument in turn at odd addresses: single elements, with NaN beside them."""
    x = hostile.normal(5, 384, dtype=torch.bfloat16)
    pair = (x, hostile.normal(5, 384, dtype=x.dtype, seed=1))
    found, slots = quantize(dict(hostile.odd_strides(x))["offset"], group_size=group_size)
    assert slots == 0
    assert_same(found, fp8_quantize(x, group_size=group_size))
    for index in range(2):
        args = list(pair)
        args[index] = dict(hostile.odd_strides(args[index]))["offset"]
        found, slots = silu_mul(*args, group_size=group_size)
        assert slots == 0
        assert_same(found, silu_mul_fp8_quantize(*pair, group_size=group_size))
    norm_args = (*pair, x[0].contiguous())
    options = {"eps": 1e-6, "group_size": group_size}
    for index in range(3):
        args = list(norm_args)
        args[index] = dict(hostile.odd_strides(args[index]))["offset"]
        found, slots = add_rms_norm(*args, **options)
        assert slots == 0
        assert_same(found, add_rms_norm_fp8_quantize(*norm_args, **options))
