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
CALIBRATION = ("argparse.py", "configparser.py", "mailbox.py", "typing.py")


@functools.cache
def draft() -> tuple[Any, Tensor, Tensor]:
    """The demo's draft model in bf16, calibration tokens, and held-out tokens."""
    model, tokenizer = demo.load(demo.draft_path())
    rows = []
    for name in CALIBRATION:
        ids = tokenizer((stdlib_directory() / name).read_text("utf-8"), verbose=False).input_ids
        rows += [ids[:512], ids[1024:1536]]
    return model, torch.tensor(rows), demo.held_out_tokens(tokenizer, context=512, limit=5120)


@functools.cache
def perplexity(config: Method) -> float:
    model, calibration, held_out = draft()
    model = copy.deepcopy(model)
    effllm.quantize_(
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
    return demo.perplexity(model, held_out)


@pytest.mark.parametrize("bits", [3, 4])
def test_group_before_channel_before_tensor(bits: int) -> None:
    for clip in (False, True):
        found = [perplexity(LinearConfig(bits, g, False, clip)) for g in (GROUP, CHANNEL, TENSOR)]
        assert found[0] < found[1] < found[2]
    found = [perplexity(KMeansConfig(bits, g)) for g in (GROUP, CHANNEL, TENSOR)]
    assert found == sorted(found)


@pytest.mark.parametrize("granularity", [CHANNEL, GROUP], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_calibrated_before_round_to_nearest(bits: int, granularity: Granularity) -> None:
    plain = perplexity(LinearConfig(bits, granularity, symmetric=False))
    clipped = perplexity(LinearConfig(bits, granularity, symmetric=False, clip=True))
    for config in (
        GptqConfig(bits, granularity, symmetric=False),
        GptqConfig(bits, granularity, symmetric=False, clip=True),
        AwqConfig(bits, granularity),
    ):
        assert perplexity(config) < plain
        if config.clip:
            assert perplexity(config) < clipped


def test_codebooks_before_linear_steps() -> None:
    """Per channel at 3 bits, also where ranges are cut for the least error."""
    codebooks = perplexity(KMeansConfig(3, CHANNEL))
    for clip in (False, True):
        assert codebooks < perplexity(LinearConfig(3, CHANNEL, False, clip))
    assert perplexity(KMeansConfig(3, CHANNEL, weighted=True)) < codebooks


@pytest.mark.parametrize("granularity", [CHANNEL, GROUP], ids=str)
def test_act_order_is_no_loss(granularity: Granularity) -> None:
    with_order = perplexity(GptqConfig(3, granularity, symmetric=False))
    without = perplexity(GptqConfig(3, granularity, symmetric=False, act_order=False))
    assert with_order < 1.005 * without


def test_more_bits_before_fewer() -> None:
    best = demo.perplexity(draft()[0], draft()[2])
    found = [perplexity(LinearConfig(bits, GROUP, False, True)) for bits in (4, 3, 2)]
    assert [best, *found] == sorted([best, *found])
