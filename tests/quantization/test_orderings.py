"""What the papers say of the methods, on a small trained model: perplexity over held-out text."""

from __future__ import annotations

import pytest
from trained_draft import draft, output_error, perplexity

from effllm import demo
from effllm.quantization import AwqConfig, GptqConfig, Granularity, KMeansConfig, LinearConfig

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


def test_more_bits_before_fewer() -> None:
    best = demo.perplexity(draft()[0], draft()[2])
    found = [perplexity(LinearConfig(bits, GROUP, False, True)) for bits in (4, 3, 2)]
    assert [best, *found] == sorted([best, *found])
