"""What the papers say of the methods, on a small trained model: perplexity over held-out text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor, nn
from trained_draft import draft, measure_any, output_error, perplexity

from effllm import demo
from effllm.analysis import round_activations
from effllm.quantization import (
    AwqConfig,
    GptqConfig,
    Granularity,
    KMeansConfig,
    LinearConfig,
    smooth_,
)

TENSOR, CHANNEL, GROUP = Granularity.tensor(), Granularity.channel(), Granularity.group(64)


@pytest.mark.parametrize("bits", [3, 4])
def test_group_before_channel_before_tensor(bits: int) -> None:
    for clip in (False, True):
        found = [perplexity(LinearConfig(bits, g, False, clip)) for g in (GROUP, CHANNEL, TENSOR)]
        assert found[0] < found[1] < found[2]
    found = [perplexity(KMeansConfig(bits, g)) for g in (GROUP, CHANNEL, TENSOR)]
    # At 4 bits a codebook for all is as good as one per channel.
    assert found[0] < min(found[1:])
    assert found[1] < 1.02 * found[2]


@pytest.mark.parametrize("granularity", [CHANNEL, GROUP], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_calibrated_before_round_to_nearest(bits: int, granularity: Granularity) -> None:
    plain = perplexity(LinearConfig(bits, granularity, symmetric=False))
    clipped = perplexity(LinearConfig(bits, granularity, symmetric=False, clip=True))
    gptq = perplexity(GptqConfig(bits, granularity, symmetric=False))
    awq = perplexity(AwqConfig(bits, granularity))
    assert max(gptq, awq) < min(plain, clipped)


def test_codebooks_before_linear_steps() -> None:
    """Per channel at 3 bits, also where ranges are cut for the least error."""
    codebooks = perplexity(KMeansConfig(3, CHANNEL))
    for clip in (False, True):
        assert codebooks < perplexity(LinearConfig(3, CHANNEL, False, clip))
    assert perplexity(KMeansConfig(3, CHANNEL, weighted=True)) < codebooks


@pytest.mark.parametrize("granularity", [CHANNEL, GROUP], ids=str)
def test_act_order_is_no_loss(granularity: Granularity) -> None:
    """By what GPTQ lowers, the error of the outputs; perplexities this close are noise."""
    configs = [GptqConfig(3, granularity, False, act_order=order) for order in (True, False)]
    assert output_error(configs[0]) < output_error(configs[1])
    assert perplexity(configs[0]) < 1.03 * perplexity(configs[1])


@pytest.mark.parametrize("granularity", [CHANNEL, Granularity.group(128)], ids=str)
def test_calibrated_before_round_to_nearest_at_8_bits(granularity: Granularity) -> None:
    """By the error of the outputs: perplexities of 8 bits are those of none."""
    _, plain = measure_any(LinearConfig(8, granularity), calibrated=True)
    assert output_error(GptqConfig(8, granularity)) < 0.6 * plain


def test_more_bits_before_fewer() -> None:
    best = demo.perplexity(draft()[0], draft()[2])
    found = [perplexity(LinearConfig(bits, GROUP, False, True)) for bits in (4, 3, 2)]
    assert [best, *found] == sorted([best, *found])


def w8a8_perplexity(model: Any, granularity: Granularity) -> float:
    """With weights of 8 bits per channel and activations of 8 bits, as they are rounded."""
    model = copy.deepcopy(model)

    def rounded(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return round_activations(args[0].flatten(0, -2), granularity).view_as(args[0])

    for layer in model.model.layers.modules():
        if type(layer) is nn.Linear:
            # A row of a weight is an output channel.
            layer.weight.data = round_activations(layer.weight.data, Granularity.token())
            layer.register_forward_pre_hook(rounded)
    return demo.perplexity(model, draft()[2])


@pytest.mark.parametrize("granularity", [Granularity.token(), TENSOR], ids=str)
def test_smoothed_before_plain_where_channels_stand_out(granularity: Granularity) -> None:
    model, calibration, held_out = draft()
    model = copy.deepcopy(model).float()
    best = demo.perplexity(model, held_out)
    model = demo.with_outliers(model, 64)
    assert demo.perplexity(model, held_out) == pytest.approx(best, rel=1e-4)
    plain = w8a8_perplexity(model, granularity)
    smooth_(model, calibration, filter_fn=lambda m, name: name != "lm_head", progress=False)
    smoothed = w8a8_perplexity(model, granularity)
    assert smoothed < 1.01 * best
    assert plain > 1.1 * best
