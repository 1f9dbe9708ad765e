"""round_to_codebook against a search over all entries, and where NF4 comes from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effllm.quantization import NF4
from effllm.quantization.codebook import round_to_codebook

SHAPES = {"tensor": (16,), "row": (12, 16), "group": (12, 4, 16)}


def nearest(weight: Tensor, codebook: Tensor, group_size: int, scales: Tensor | None) -> Tensor:
    """The distance of every weight to its nearest entry, in float64, by trying all of them."""
    n, k = weight.shape
    groups = -(-k // group_size)
    index = torch.arange(k) // group_size
    tables = codebook.double()
    tables = tables if tables.dim() == 3 else tables.view(-1, 1, 16).expand(n, groups, 16)
    values = tables[:, index]
    if scales is not None:
        values = values * scales.double()[:, index, None]
    return (values - weight.double().unsqueeze(-1)).abs().amin(-1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("per", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_of_the_nearest_entry(per: str, scaled: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(12, 100).to(dtype)
    codebook = torch.randn(SHAPES[per])  # not sorted
    codes, scales = round_to_codebook(weight, codebook, 32, scaled)
    assert (codes.dtype, codes.shape, codes.is_contiguous()) == (torch.uint8, (12, 100), True)
    assert int(codes.max()) <= 15
    assert (scales is not None) == scaled
    index = torch.arange(100) // 32
    tables = codebook if per == "group" else codebook.view(-1, 1, 16).expand(12, 4, 16)
    found = tables[:, index].gather(2, codes.long().unsqueeze(-1)).squeeze(-1).double()
    if scales is not None:
        assert (scales.dtype, scales.shape) == (dtype, (12, 4))
        found = found * scales.double()[:, index]
    distance = (found - weight.double()).abs()
    torch.testing.assert_close(
        distance,
        nearest(weight, codebook, 32, scales),
        rtol=0,
        atol=1e-6 * float(weight.abs().max()),
    )


def test_nf4_are_the_quantiles_of_the_paper() -> None:
    """QLoRA, equation 4: 8 quantiles below 0 and 9 above, evenly spaced from 1/2 to an offset that
    averages 1 - 1/30 and 1 - 1/32, 0 counted once, scaled to [-1, 1]."""
    offset = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(0.5, offset, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(0.5, offset, 8, dtype=torch.float64))
    expected = torch.cat([below.flip(0), above[1:]]) / above[-1]
    # The published table came from offset 0.9677083, in single precision.
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), expected, rtol=0, atol=1e-6)
    assert len(NF4) == 16
    assert list(NF4) == sorted(NF4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_of_zeros_and_tiny_weights_stay_finite(dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 64, dtype=dtype)
    weight[1] = 1e-30
    codes, scales = round_to_codebook(weight, torch.tensor(NF4), 32, True)
    assert scales is not None
    assert scales.isfinite().all()
    assert (scales > 0).all()
    assert (codes[0] == NF4.index(0.0)).all()


def test_nf4_error_is_below_that_of_uniform_steps() -> None:
    """On normal weights, what the format is for."""
    weight = torch.randn(64, 256)
    errors = []
    for table in (torch.tensor(NF4), torch.linspace(-1, 1, 16)):
        codes, scales = round_to_codebook(weight, table, 64, True)
        assert scales is not None
        found = table[codes.long()] * scales.repeat_interleave(64, 1)
        errors.append((found - weight).square().mean().item())
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("weight", "codebook", "message"),
    [
        (torch.ones(4), torch.ones(16), "weight must be a float matrix"),
        (torch.ones(4, 4, dtype=torch.int8), torch.ones(16), "weight must be a float matrix"),
        (torch.ones(4, 4, device="meta"), torch.ones(16), "on the meta device"),
        (torch.full((4, 4), math.nan), torch.ones(16), "weight holds NaN or infinity"),
        (torch.ones(4, 4), torch.full((16,), math.inf), "codebook holds NaN or infinity"),
        (torch.ones(4, 4), torch.ones(15), r"codebook must be .*, got torch.float32 \[15\]"),
        (torch.ones(4, 4), torch.ones(3, 16), r"\[4, 16\] or \[4, 1, 16\], got .* \[3, 16\]"),
        (torch.ones(4, 4), torch.ones(16, dtype=torch.int32), "must be float .* got torch.int32"),
    ],
)
def test_errors(weight: Tensor, codebook: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_to_codebook(weight, codebook, 32, False)
