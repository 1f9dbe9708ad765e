"""What the papers say of the methods, on a small trained model: perplexity over held-out text."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm import demo
from effllm.demo.corpus import stdlib_directory
from effllm.nn.packed_linear import PackedLinear
from effllm.quantization import (
    AwqConfig,
    GptqConfig,
    Granularity,
    KMeansConfig,
    LinearConfig,
    Method,
)

pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

TENSOR, CHANNEL, GROUP = Granularity.tensor(), Granularity.channel(), Granularity.group(64)
# Modules of the standard library that the models were trained on.
CALIBRATION = ("argparse.py", "configparser.py", "typing.py")


@functools.cache
def draft() -> tuple[Any, Tensor, Tensor]:
    """The demo's draft model in bf16, calibration tokens, and held-out tokens."""
    model, tokenizer = demo.load(demo.draft_path())
    rows = []
    for name in CALIBRATION:
        ids = tokenizer((stdlib_directory() / name).read_text("utf-8"), verbose=False).input_ids
        rows += [ids[:512], ids[1024:1536]]
    return model, torch.tensor(rows), demo.held_out_tokens(tokenizer, context=512, limit=4096)


def perplexity(config: Method) -> float:
    return measure(config)[0]


def output_error(config: Method) -> float:
    return measure(config)[1]


@functools.cache
def measure(config: Method) -> tuple[float, float]:
    """Perplexity, and the mean error of a layer's output over the calibration data."""
    model, calibration, held_out = draft()
    model = copy.deepcopy(model)
    report = effllm.quantize_(
        model,
        config,
        lambda module, name: name != "lm_head",
        calibration=calibration if config.needs_calibration else None,
        progress=False,
    )
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = nn.Parameter(layer.weight.bfloat16())
            model.set_submodule(name, dense)
    errors = [layer.output_error or 0 for layer in report.layers]
    return demo.perplexity(model, held_out), sum(errors) / len(errors)


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
