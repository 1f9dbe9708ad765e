"""w4a8_gemm's GPU kernels, proved without a GPU: their own headers, on lanes that take turns,
against the op on the CPU."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import pytest
import torch
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm.ops import w4a8_gemm
from effllm.testing import hostile
from effllm.testing.case import Kwargs
from effllm.testing.cases.w4a8_gemm import TwoLevelW4A8GemmCase, W4A8GemmCase
from effllm.testing.compare import assert_close_to_reference, assert_equal

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("w4a8_gemm.cpp", tmp_path_factory.mktemp("w4a8_gemm"))


CASES = [
    W4A8GemmCase(m, n, k, group_size, dtype, zeros, not zeros, scales_dtype, x_per)
    for m, n, k, group_size, zeros in (
        # Each configuration of tokens and slices of K; tails of N and K; short groups and steps.
        (1, 64, 128, -1, False),
        (7, 72, 333, 32, True),
        (8, 40, 200, 64, True),
        (9, 130, 272, 128, False),
        (32, 65, 1040, 64, False),
        (33, 17, 77, -1, True),
        (70, 136, 200, 32, False),
    )
    for dtype, scales_dtype, x_per in ((BF16, HALF, "row"), (FP32, FP32, "tensor"))
]
TWO_LEVEL_CASES = [
    TwoLevelW4A8GemmCase(m, n, k, group_size, dtype, False, True)
    for m, n, k, group_size in (
        (1, 64, 128, -1),
        (7, 72, 333, 32),
        (9, 130, 272, 128),
        (33, 65, 1040, 64),
        (70, 17, 200, -1),
    )
    for dtype in (BF16, FP32)
]


def check(case: W4A8GemmCase, library: ctypes.CDLL, cols: int = 0, ctas: int = 1) -> None:
    """A kernel of a tile of so many tokens, or the one of mma.sync, against the op."""
    args, kwargs = case.make("cpu")
    expected = w4a8_gemm(*args, **kwargs)
    out, check_guards = hostile.guarded(torch.full_like(expected, torch.nan))
    arguments = (*args, *[None] * (7 - len(args)), out)
    tensors = (TensorArgument * 8)(*(as_argument(arg) for arg in arguments))
    group_size = ctypes.c_int64(kwargs["group_size"])
    assert library.w4a8_gemm(tensors, group_size, ctypes.c_int(cols), ctypes.c_int(ctas)) == 0
    check_guards()
    if args[3].shape[1] == 1:
        assert_equal(out, expected)
    else:
        reference = case.reference(*args, **kwargs)
        assert_close_to_reference(out, reference, case.baseline(*args, **kwargs), cosine=True)


@pytest.mark.parametrize("case", CASES + TWO_LEVEL_CASES, ids=lambda case: case.id)
def test_mma_sync(case: W4A8GemmCase, library: ctypes.CDLL) -> None:
    check(case, library)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("out_dtype", [BF16, HALF, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize(
    ("m", "n", "k", "cols"),
    [(5, 264, 1104, 16), (40, 264, 272, 32), (70, 72, 1040, 64), (130, 136, 144, 128)],
)
def test_wgmma(
    m: int,
    n: int,
    k: int,
    cols: int,
    group_size: int,
    out_dtype: torch.dtype,
    zeros: bool,
    library: ctypes.CDLL,
) -> None:
    """Several tiles for a CTA, more stages than its ring has, tails of M, N and K."""
    check(W4A8GemmCase(m, n, k, group_size, out_dtype, zeros, True), library, cols)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", [64, 128, -1])
def test_wgmma_of_256_tokens(group_size: int, zeros: bool, library: ctypes.CDLL) -> None:
    check(W4A8GemmCase(270, 192, 208, group_size, BF16, zeros, True), library, 256, 2)


@pytest.mark.parametrize("out_dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(
    ("m", "n", "k", "cols"),
    [(5, 264, 1104, 16), (40, 264, 272, 32), (70, 72, 1040, 64), (130, 136, 144, 128)],
)
def test_wgmma_with_multipliers(
    m: int,
    n: int,
    k: int,
    cols: int,
    group_size: int,
    out_dtype: torch.dtype,
    library: ctypes.CDLL,
) -> None:
    case = TwoLevelW4A8GemmCase(m, n, k, group_size, out_dtype, False, True)
    check(case, library, cols)


@pytest.mark.parametrize("group_size", [32, 128])
def test_wgmma_of_256_tokens_with_multipliers(group_size: int, library: ctypes.CDLL) -> None:
    check(TwoLevelW4A8GemmCase(270, 192, 208, group_size, BF16), library, 256, 2)


@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("bounds", [(0, 2, 9), (0, 5, 6, 7, 9)])
def test_slices_of_k_add_up(bounds: tuple[int, ...], group_size: int, library: ctypes.CDLL) -> None:
    """What CTAs of a cluster add up of a tile, in all."""
    case = W4A8GemmCase(11, 200, 1104, group_size, FP32, zeros=True, x_per="tensor")
    (x, x_scales, *weights), kwargs = case.make("cpu")
    if group_size == -1:
        weights[1].fill_(1)
    check_slices(x, x_scales.fill_(1), [*weights, None], kwargs, bounds, library)


@pytest.mark.parametrize("group_size", [64, 128])
def test_slices_of_k_with_multipliers_add_up(group_size: int, library: ctypes.CDLL) -> None:
    case = TwoLevelW4A8GemmCase(11, 200, 1104, group_size, FP32, x_per="tensor")
    (x, x_scales, *weights), kwargs = case.make("cpu")
    weights[1].fill_(1)
    check_slices(x, x_scales.fill_(1), weights, kwargs, (0, 5, 6, 7, 9), library)


def check_slices(
    x: Tensor,
    x_scales: Tensor,
    weights: list[Tensor | None],
    kwargs: Kwargs,
    bounds: tuple[int, ...],
    library: ctypes.CDLL,
) -> None:
    expected = w4a8_gemm(x, x_scales, *weights, **kwargs)
    for row_tile in range(2):
        total = torch.zeros(16, 128)
        for first, end in pairwise(bounds):
            sums = torch.full((16, 128), torch.nan)
            arguments = (x, x_scales, *weights, sums)
            tensors = (TensorArgument * 8)(*(as_argument(arg) for arg in arguments))
            numbers = (ctypes.c_int(n) for n in (row_tile, first, end - first))
            library.w4a8_slice(tensors, ctypes.c_int64(kwargs["group_size"]), *numbers)
            total += sums
        rows = min(128, 200 - 128 * row_tile)
        wanted = expected[:, 128 * row_tile : 128 * row_tile + rows]
        torch.testing.assert_close(total[:11, :rows], wanted, rtol=1e-5, atol=1e-3)
        assert total[11:, :rows].eq(0).all()
