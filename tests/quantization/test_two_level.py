"""Scales of two levels: against a search through all of them, products, and what they cost."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trained_draft import draft, output_error

import effllm
from effllm import demo
from effllm.nn import W4A8Linear
from effllm.nn.w4a8_linear import split_scales
from effllm.quantization import (
    AwqConfig,
    GptqConfig,
    Granularity,
    Int4Config,
    LinearConfig,
    Method,
    smooth_,
)
from effllm.quantization.statistics import InputStatistics

TOKEN, GROUP = Granularity.token(), Granularity.group(32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def uneven(n: int, k: int) -> Tensor:
    """Weights whose groups of 32 differ: what multipliers are for."""
    groups = torch.randn(n, -(-k // 32)).mul(0.6).exp().repeat_interleave(32, 1)[:, :k]
    return torch.randn(n, k) * groups


def best_error(row: np.ndarray, bits: int, size: int) -> float:
    """The smallest squared error of a row by any step of 4 significant bits, and any multipliers
    of 1 to 15; one weight after the other, in float64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = [row[j : j + size] for j in range(0, len(row), size)]

    def error(group: np.ndarray, scale: float) -> float:
        codes = np.clip(np.round(group / scale), low, high)
        return float(((codes * scale - group) ** 2).sum())

    # Of three octaves, below which even 15 steps cut the range in half.
    top = 2.0 ** np.floor(np.log2(np.abs(row).max() / -low / 8))
    steps = [top * m / 8 / 2**octave for octave in range(-1, 2) for m in range(8, 16)]
    return min(
        sum(min(error(group, step * m) for m in range(1, 16)) for group in groups) for step in steps
    )


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("clip", [False, True])
def test_the_search_finds_almost_the_best(clip: bool, bits: int) -> None:
    weight = uneven(12, 100)
    config = LinearConfig(bits, GROUP, clip=clip, inputs=TOKEN)
    dense = config.quantise(weight, None).dense()
    ours = (dense - weight).double().square().sum(1)
    best = torch.tensor([best_error(row.double().numpy(), bits, 32) for row in weight])
    assert (ours >= best * (1 - 1e-5)).all()
    # Of three seeds at most 1.026 and 1.044: without clipping, multiples are those beside a range
    # that holds all.
    assert ours.sum() <= (1.04 if clip else 1.06) * best.sum()


@pytest.mark.parametrize("config", [LinearConfig, GptqConfig, AwqConfig])
def test_two_levels_cost_little(config: type[LinearConfig]) -> None:
    """In errors of outputs, beside scales of one level found in the same way."""
    weight, x = uneven(64, 256), torch.randn(512, 256) * torch.randn(256).mul(0.5).exp()
    inputs = InputStatistics(256)
    inputs.add(x)
    for clip, allowed in ((True, 1.03), (False, 1.0)):
        errors = []
        for two_level in (False, True):
            method = config(4, GROUP, True, clip, inputs=TOKEN, two_level=two_level)
            dense = method.quantise(weight, inputs).dense()
            errors.append(float((x @ (dense - weight).T).square().sum()))
        assert errors[1] < allowed * errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-7], ids=str)
@pytest.mark.parametrize("granularity", [GROUP, Granularity.block(3, 32)], ids=str)
def test_products_are_exact_in_every_dtype(
    granularity: Granularity, size: float, dtype: torch.dtype, device: str
) -> None:
    weight = (uneven(10, 100) * size).to(device, dtype)
    weight[3], weight[4, 32:64] = 0, 0
    codes = LinearConfig(4, granularity, inputs=TOKEN).quantise(weight, None)
    assert codes.scales.dtype == dtype
    steps, multipliers = split_scales(codes.scales)
    assert (steps.dtype, steps.shape) == (dtype, (10, 1))
    assert (multipliers.dtype, multipliers.shape) == (torch.uint8, (10, 4))
    assert ((multipliers >= 1) & (multipliers <= 15)).all()
    assert torch.equal((steps.double() * multipliers).to(dtype), codes.scales)
    assert torch.equal(steps.double() * multipliers, codes.scales.double())
    dense = codes.dense()
    assert torch.isfinite(dense).all()
    assert not dense[3].any()
    assert not dense[4, 32:64].any()
    linear = nn.Linear(100, 10, device=device, dtype=dtype)
    layer = codes.layer(linear, W4A8Linear, two_level=True)
    assert torch.equal(layer.weight, dense.to(dtype))
    assert torch.equal(layer.group_scales.double(), codes.scales.double())


def test_scales_of_one_level_are_refused() -> None:
    scales = torch.tensor([[3.0, 5.0], [1.0, 16.0]])
    with pytest.raises(ValueError, match="1 to 15 times one number in each row, got others in row"):
        split_scales(scales)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="row 0"):
            split_scales(torch.tensor([[1.0, wrong]]))
    steps, multipliers = split_scales(scales[:1] * 0.3)
    assert multipliers.tolist() == [[3, 5]]
    assert torch.equal(steps * multipliers, scales[:1] * 0.3)


@pytest.mark.parametrize(
    ("config", "options", "found"),
    [
        (LinearConfig, {}, r"inputs=token\(\), got None"),
        (LinearConfig, {"inputs": TOKEN, "symmetric": False}, "symmetric=True, got False"),
        (AwqConfig, {"inputs": TOKEN}, "symmetric=True, got False"),
        (
            LinearConfig,
            {"inputs": TOKEN, "granularity": Granularity.channel()},
            r"granularity group\(n\) or block\(m, n\), got channel\(\)",
        ),
        (GptqConfig, {"inputs": TOKEN, "static_groups": False}, "static_groups=True, got False"),
    ],
)
def test_what_two_levels_need(
    config: type[LinearConfig], options: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=f"{config.__name__}: two_level needs {found}"):
        config(**options, two_level=True)
    assert not config(**options).grid.two_level
    possible = config(4, GROUP, True, inputs=TOKEN)
    assert possible.grid.two_level
    assert not config(4, GROUP, True, inputs=TOKEN, two_level=False).grid.two_level


@pytest.mark.parametrize("two_level", [None, True, False])
def test_configs_make_the_layer(two_level: bool | None) -> None:
    model = nn.Sequential(nn.Linear(96, 64))
    effllm.quantize_(model, Int4Config(32, inputs=TOKEN, two_level=two_level), progress=False)
    assert (model[0].multipliers is None) == (two_level is False)
    assert "two_level=True" in repr(model) or two_level is False


@pytest.mark.parametrize("clip", [False, True])
def test_calibrated_before_round_to_nearest(clip: bool) -> None:
    """By the error of the outputs, as with scales of one level."""
    group = Granularity.group(128)
    plain = output_error(CalibratedLinear(4, group, clip=clip, inputs=TOKEN))
    gptq = output_error(GptqConfig(4, group, clip=clip, inputs=TOKEN))
    awq = output_error(AwqConfig(4, group, symmetric=True, clip=clip, inputs=TOKEN))
    assert gptq < 0.9 * plain
    assert awq < plain


class CalibratedLinear(LinearConfig):
    """Asks for calibration, so that output errors are measured."""

    needs_calibration = True


@functools.cache
def w4a8_perplexity(config: Method, outliers: bool, smooth: bool) -> float:
    """Of the draft model, on its kernels."""
    model, calibration, held_out = draft()
    model = copy.deepcopy(model).float()

    def chosen(module: nn.Module, name: str) -> bool:
        return name != "lm_head"

    if outliers:
        model = demo.with_outliers(model, 64)
    if smooth:
        smooth_(model, calibration, filter_fn=chosen, progress=False)
    needed = calibration if config.needs_calibration else None
    effllm.quantize_(model, config, chosen, calibration=needed, progress=False)
    layers = [m for m in model.modules() if isinstance(m, W4A8Linear)]
    assert layers
    assert all((m.multipliers is not None) == config.grid.two_level for m in layers)
    return demo.perplexity(model, held_out)


def test_smoothed_where_channels_stand_out() -> None:
    """SmoothQuant's migration, then W4A8 with scales of one level and of two."""
    group = Granularity.group(128)
    one, two = (
        LinearConfig(4, group, clip=True, inputs=TOKEN, two_level=two) for two in (False, True)
    )
    unharmed = w4a8_perplexity(two, outliers=False, smooth=False)
    planted = w4a8_perplexity(two, outliers=True, smooth=False)
    smoothed = w4a8_perplexity(two, outliers=True, smooth=True)
    assert planted > 1.1 * unharmed
    assert smoothed < 0.9 * planted
    assert smoothed < 1.02 * w4a8_perplexity(one, outliers=True, smooth=True)
    assert unharmed < 1.02 * w4a8_perplexity(one, outliers=False, smooth=False)
