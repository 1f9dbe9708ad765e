"""fp8_quantize_tensor beyond the cases of the contract: bits, special values, layouts, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effllm.ops import fp8_quantize, fp8_quantize_tensor
from effllm.testing import hostile
from effllm.testing.cases.fp8_quantize_tensor import CASES, Fp8QuantizeTensorCase
from effllm.testing.compare import assert_equal

INF, NAN = math.inf, math.nan


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def test_known_scale_saturates(device: str) -> None:
    x = torch.tensor([447, 448, 449, 464, 480, 1e9, INF, -1e9, -INF, 0.0, -0.0], device=device)
    codes, scale = fp8_quantize_tensor(x, torch.ones(1, device=device))
    assert codes.float().tolist() == [448] * 7 + [-448, -448, 0, 0]
    assert scale.tolist() == [1]
    assert not (bits(codes) & 0x7F == 0x7F).any()


def test_nan_stays_where_it_is_by_a_known_scale(device: str) -> None:
    x = torch.tensor([1, NAN, -NAN, 2], device=device)
    codes, _ = fp8_quantize_tensor(x, torch.tensor(0.5, device=device))
    assert bits(codes).tolist() == [0x40, 0x7F, 0x7F, 0x48]


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_not_finite_anywhere_makes_the_own_scale_nan(value: float, device: str) -> None:
    x = hostile.normal(40, 2000, device=device)
    x[39, 1999] = value
    codes, scale = fp8_quantize_tensor(x)
    assert scale.isnan().all()
    assert not bits(codes).any()


def test_zeros_have_scale_one_and_code_zero(device: str) -> None:
    codes, scale = fp8_quantize_tensor(torch.zeros(5, 33, device=device))
    assert scale.tolist() == [1]
    assert not bits(codes).any()


def test_scales_that_are_no_scales(device: str) -> None:
    """0 saturates all but 0, whose quotient is no number; NaN makes every code 0."""
    x = torch.tensor([2.0, -3.0, 0.0], device=device)
    codes, _ = fp8_quantize_tensor(x, torch.zeros(1, device=device))
    assert bits(codes).tolist() == [0x7E, 0xFE, 0x7F]
    codes, scale = fp8_quantize_tensor(x, torch.full((1,), NAN, device=device))
    assert scale.isnan().all()
    assert not bits(codes).any()
    codes, _ = fp8_quantize_tensor(x, torch.full((1,), INF, device=device))
    assert codes.float().tolist() == [0, 0, 0]


def test_is_one_row_of_fp8_quantize(device: str) -> None:
    x = hostile.normal(30, 700, dtype=torch.float16, device=device)
    codes, scale = fp8_quantize_tensor(x)
    row_codes, row_scale = fp8_quantize(x.flatten())
    assert_equal(bits(codes).flatten(), bits(row_codes))
    assert_equal(scale, row_scale)


def test_results_do_not_depend_on_strides(device: str) -> None:
    x = hostile.normal(6, 200, dtype=torch.bfloat16, device=device)
    for name, view in hostile.odd_strides(x):
        for scale in (None, torch.tensor([[0.01]], device=device)):
            codes, used = fp8_quantize_tensor(view, scale)
            wanted, wanted_scale = fp8_quantize_tensor(view.contiguous(), scale)
            assert_equal(bits(codes), bits(wanted), name=name)
            assert_equal(used, wanted_scale, name=name)


def test_a_scalar_is_a_tensor(device: str) -> None:
    codes, scale = fp8_quantize_tensor(torch.tensor(-7.0, device=device))
    assert codes.float().item() == -448
    assert scale.item() == pytest.approx(7 / 448, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_and_cpu_agree_to_the_bit(case: Fp8QuantizeTensorCase) -> None:
    args, _ = case.make("cpu")
    codes, scale = fp8_quantize_tensor(*args)
    gpu_codes, gpu_scale = fp8_quantize_tensor(*(arg.cuda() for arg in args))
    assert_equal(bits(gpu_codes).cpu(), bits(codes))
    assert_equal(gpu_scale.cpu(), scale)


@pytest.mark.gpu
def test_captured_as_the_very_first_call_and_repeatable() -> None:
    """Each replay has to start from a maximum of nothing."""
    x = hostile.normal(50, 384, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scale = fp8_quantize_tensor(x)
    for factor in (100.0, 0.01):
        x.copy_(hostile.normal(50, 384, seed=7) * factor)
        graph.replay()
        wanted, wanted_scale = fp8_quantize_tensor(x)
        assert_equal(bits(codes), bits(wanted))
        assert_equal(scale, wanted_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", range(-3, 4))
def test_gpu_quotients_next_to_where_codes_change(offset: int) -> None:
    """Scales next to multiples of 2^20 units in the last place have multiples as near to the middle
    between two floats as any; and scales of every size, special ones too."""
    near = [((j << 20) + offset) * 2.0**-27 for j in range(9, 16)]
    sizes = [1.7 * 2.0**power for power in range(-126, 127, 11)]
    middles = torch.arange(16, 32) * 2.0 ** torch.arange(-14, 5)[:, None]
    steps = 1 + torch.arange(-3, 4) * 2.0**-24
    points = (middles.flatten()[:, None].double() * steps).flatten()
    special = torch.tensor([0.0, INF, NAN, 3e38, 1e-45, 1e-38])
    for scale in torch.tensor([*near, *sizes, 0.0, -0.7, 1e-45, INF, NAN]):
        x = torch.cat([(points * scale.double()).float(), special])
        x = torch.cat([x, -x])
        codes, _ = fp8_quantize_tensor(x.cuda(), scale.cuda())
        wanted, _ = fp8_quantize_tensor(x, scale)
        assert_equal(bits(codes).cpu(), bits(wanted), name=f"scale {scale}")


X = torch.ones(4, 128)
ERRORS = [
    (X, torch.ones(2), r"scale must have one element, got \[2\]"),
    (X, torch.ones(0), r"scale must have one element, got \[0\]"),
    (X, torch.ones(1, dtype=torch.int32), "scale must be float16, bfloat16 or float32, got int32"),
    (X.double(), None, "x must be float16, bfloat16 or float32, got another dtype"),
]


@pytest.mark.parametrize(("x", "scale", "message"), ERRORS)
def test_errors(x: Tensor, scale: Tensor | None, message: str, device: str) -> None:
    scale = None if scale is None else scale.to(device)
    with pytest.raises(RuntimeError, match=f"effllm::fp8_quantize_tensor: {message}"):
        fp8_quantize_tensor(x.to(device), scale)
