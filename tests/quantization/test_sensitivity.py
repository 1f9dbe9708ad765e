"""choose_configs: errors of single layers, and bits that are spent where they help most."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from trained_draft import draft, measure_any, perplexity

import effllm
from effllm.nn import Int4Linear
from effllm.quantization import GgufConfig, GptqConfig, Granularity, LinearConfig, choose_configs
from effllm.quantization.gguf_blocks import GgufType
from effllm.quantization.sensitivity import allocate

IDS = torch.arange(4 * 24).view(4, 24) * 37 % 97
CONFIGS = [LinearConfig(bits, Granularity.group(32)) for bits in (4, 2, 3)]


def by_bits(
    errors: dict[str, list[float]], bits: list[int], sizes: dict[str, int], average: float
) -> dict[str, int]:
    costs = {name: [number * size for number in bits] for name, size in sizes.items()}
    return allocate(errors, costs, average * sum(sizes.values()))


def test_the_best_of_all_allocations() -> None:
    """Errors that fall by less with every bit, for layers of one size: then greedy is optimal."""
    bits = [2, 3, 4]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        falls = torch.rand(5, 3, generator=generator).sort(dim=1, descending=True).values
        curves = falls.flip(1).cumsum(1).flip(1)
        errors = {str(i): [float(e) for e in row] for i, row in enumerate(curves)}
        for average in (2.0, 2.6, 3.0, 3.4, 4.0):
            found = by_bits(errors, bits, dict.fromkeys(errors, 10), average)
            assert sum(bits[i] for i in found.values()) <= average * 5
            best = min(
                sum(errors[str(layer)][i] for layer, i in enumerate(choice))
                for choice in itertools.product(range(3), repeat=5)
                if sum(bits[i] for i in choice) <= average * 5
            )
            assert sum(errors[name][i] for name, i in found.items()) == pytest.approx(best)


def test_large_layers_cost_more() -> None:
    errors = {"large": [1.0, 0.0], "small": [0.5, 0.0]}
    sizes = {"large": 100, "small": 10}
    assert by_bits(errors, [2, 4], sizes, 2.5) == {"large": 0, "small": 1}
    assert by_bits(errors, [2, 4], sizes, 3.9) == {"large": 0, "small": 1}
    assert by_bits(errors, [2, 4], sizes, 4.0) == {"large": 1, "small": 1}
    # A step that helps nothing is not taken, however cheap.
    assert by_bits({"a": [1.0, 1.0]}, [2, 4], {"a": 1}, 4.0) == {"a": 0}


def test_what_is_better_and_no_dearer_is_taken() -> None:
    """Options need no order: the second is better than the first at the same cost."""
    errors = {"a": [1.0, 0.5, 0.1, 0.2], "b": [1.0, 0.9, 0.3, 0.2]}
    costs = {"a": [10, 10, 30, 20], "b": [10, 10, 30, 40]}
    assert allocate(errors, costs, 20) == {"a": 1, "b": 1}
    assert allocate(errors, costs, 30) == {"a": 3, "b": 1}
    assert allocate(errors, costs, 50) == {"a": 3, "b": 2}
    assert allocate(errors, costs, 70) == {"a": 2, "b": 3}


def test_bytes_are_those_that_layers_take() -> None:
    """Of types of GGUF, whose bits differ in memory as well."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    types: list[GgufType] = ["q8_0", "q4_k", "q6_k"]
    configs = [GgufConfig(tensor_type) for tensor_type in types]
    data = [torch.randn(64, 256)]
    least, most = (3 * 256 * 256 * bits / 8 for bits in (4.625, 8.5625))
    chosen = {}
    for budget in (int(least), int(0.6 * least + 0.4 * most), int(most)):
        mixture = choose_configs(model, configs, data, max_bytes=budget, progress=False)
        copied = copy.deepcopy(model)
        report = effllm.quantize_(copied, mixture, progress=False)
        held = sum(p.nbytes for n, p in copied.named_parameters() if not n.endswith("bias"))
        assert held == sum(layer.bytes for layer in report.layers) <= budget
        chosen[budget] = sorted(config.bits for config in mixture.values())
    assert list(chosen.values()) == [[4, 4, 4], [4, 4, 8], [8, 8, 8]]
    with pytest.raises(ValueError, match=f"max_bytes must be at least {int(least)}, got 7"):
        choose_configs(model, configs, data, max_bytes=7, progress=False)


def test_the_model_stays_and_the_mixture_is_taken(llama: Any) -> None:
    before = copy.deepcopy(llama.state_dict())
    mixture = choose_configs(
        llama,
        CONFIGS,
        IDS,
        average_bits=3.3,
        filter_fn=lambda module, name: name != "lm_head",
        progress=False,
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    sizes = {name: llama.get_submodule(name).weight.numel() for name in mixture}
    assert len(mixture) == 21
    assert sum(sizes[n] * c.bits for n, c in mixture.items()) <= 3.3 * sum(sizes.values())
    assert len({config.bits for config in mixture.values()}) > 1
    report = effllm.quantize_(llama, mixture, progress=False)
    assert {layer.name: layer.bits for layer in report.layers} == {
        name: config.bits for name, config in mixture.items()
    }
    assert isinstance(llama.model.layers[0].mlp.up_proj, Int4Linear)
    assert type(llama.lm_head) is nn.Linear


def test_errors_are_those_of_the_output() -> None:
    """Layers of equal size: bits go where an independent sum of squares says."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[:, ::32] *= 20  # outliers that leave few levels for all others
    x = torch.randn(200, 64)
    data = [x]
    errors: dict[str, list[float]] = {}
    for i, layer in enumerate(model):
        x = x if i == 0 else model[i - 1](x).detach()
        out = layer(x).detach() - layer.bias.detach()
        errors[str(i)] = []
        for bits in (2, 3, 4):
            config = LinearConfig(bits, Granularity.group(32))
            dense = config.quantise(layer.weight.detach(), None).dense()
            errors[str(i)].append(float((x @ dense.T - out).square().sum() / out.square().sum()))
    for average in (2.4, 2.7, 3.0, 3.4):
        expected = by_bits(errors, [2, 3, 4], dict.fromkeys(errors, 64 * 64), average)
        found = choose_configs(model, CONFIGS, data, average_bits=average, progress=False)
        assert {name: config.bits for name, config in found.items()} == {
            name: index + 2 for name, index in expected.items()
        }


def test_better_than_the_same_bits_for_all() -> None:
    configs = [GptqConfig(bits, Granularity.group(64), False, clip=True) for bits in (2, 3, 4)]
    model, calibration, _ = draft()

    def blocks(module: nn.Module, name: str) -> bool:
        return name != "lm_head"

    mixture = choose_configs(
        model, configs, calibration, average_bits=3.0, filter_fn=blocks, progress=False
    )
    assert measure_any(mixture, calibrated=True)[0] < perplexity(configs[1])


@pytest.mark.parametrize(
    ("configs", "average", "message"),
    [
        ([], 3.0, r"got \[\] and 3\.0"),
        ([LinearConfig(3), LinearConfig(3)], 3.0, r"must differ in bits, .* got \[3, 3\]"),
        (CONFIGS, 1.5, r"at least the fewest, got \[2, 3, 4\] and 1\.5"),
    ],
)
def test_errors(configs: list[LinearConfig], average: float, message: str, llama: Any) -> None:
    with pytest.raises(ValueError, match=message):
        choose_configs(llama, configs, IDS, average_bits=average)
    for limits in ({}, {"average_bits": 3.0, "max_bytes": 10**6}):
        with pytest.raises(ValueError, match="either average_bits or max_bytes is needed"):
            choose_configs(llama, CONFIGS, IDS, **limits)
    with pytest.raises(ValueError, match="the model has no linear layer to quantise"):
        choose_configs(nn.Sequential(nn.ReLU()), CONFIGS, IDS, average_bits=3.0)
