"""smooth_: what a model computes stays, and activations and weights share the outliers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_families import FAMILIES, IDS, make
from torch import Tensor, nn

from effllm.analysis import round_activations
from effllm.quantization import Granularity, smooth_

# A row of a weight is what a token is of activations.
ROWS = Granularity.token()


def peaks(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """The largest inputs and weights of each input channel of a layer."""
    linear = model.get_submodule(name)
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].flatten(0, -2).abs().amax(0), linear.weight.detach().abs().amax(0)


def logits(model: Any) -> Tensor:
    """In float64: what random weights make of rounding differs between processors."""
    return copy.deepcopy(model).double()(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family: str) -> None:
    model = make(family)
    before = copy.deepcopy(model)
    folded = smooth_(model, IDS, progress=False)
    assert len(folded) >= 2 * 2
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-3, atol=1e-3)
    changed = {
        n for n, p in before.named_parameters() if not torch.equal(p, model.get_parameter(n))
    }
    expected = {*folded, *(name for names in folded.values() for name in names)}
    assert {name.rsplit(".", 1)[0] for name in changed} == expected


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_equation_4(alpha: float) -> None:
    """At 1/2 the peaks of activations and weights are equal in every channel."""
    model = make("Llama")
    name = "model.layers.0.mlp.down_proj"
    x, w = peaks(model, name)
    folded = smooth_(model, IDS, alpha=alpha, progress=False)
    assert folded["model.layers.0.mlp.up_proj"] == [name]
    after_x, after_w = peaks(model, name)
    scales = x**alpha / w ** (1 - alpha)
    torch.testing.assert_close(after_x, x / scales, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after_w, w * scales, rtol=1e-3, atol=1e-5)
    if alpha == 0.5:
        torch.testing.assert_close(after_x, after_w, rtol=1e-3, atol=1e-5)


def test_eight_bits_for_both_lose_less() -> None:
    """One scale per token and one per output channel, which outliers of a channel waste."""
    x = torch.randn(64, 64)
    x[:, 7] *= 60
    norm, linear = nn.LayerNorm(64), nn.Linear(64, 48)
    norm.weight.data[7] = 40
    model = nn.Sequential(norm, linear)

    @torch.no_grad()
    def error() -> float:
        inputs, weight = model[0](x), model[1].weight
        rounded = []
        for values in (inputs, weight):
            step = values.abs().amax(1, keepdim=True) / 127
            rounded.append((values / step).round() * step)
        return float((rounded[0] @ rounded[1].T - inputs @ weight.T).square().mean())

    before = error()
    assert smooth_(model, [x], progress=False) == {"0": ["1"]}
    assert error() < 0.3 * before


@pytest.mark.parametrize("factor", [1.0, 20.0, 500.0])
def test_the_alpha_that_is_found_is_nearly_the_best(factor: float) -> None:
    """By what 8 bits really cost, with one scale for the inputs and one per output channel."""
    x = torch.randn(256, 64)
    norm, linear = nn.LayerNorm(64), nn.Linear(64, 48)
    norm.weight.data[[7, 30]] = factor
    linear.weight.data[:, 20] *= 10
    norm.weight.data[3] = linear.weight.data[0, 5] = 0
    linear.weight.data[:, 6] = 0
    weight = linear.weight.detach().clone()
    exact = norm(x).detach() @ weight.T

    @torch.no_grad()
    def error(alpha: float | None) -> float:
        model = copy.deepcopy(nn.Sequential(norm, linear))
        smooth_(model, [x], alpha=alpha, progress=False)
        inputs = round_activations(model[0](x), Granularity.tensor())
        return float((inputs @ round_activations(model[1].weight, ROWS).T - exact).square().mean())

    errors = [error(step / 20) for step in range(21)]
    assert error(None) < 1.1 * min(errors)
    assert error(None) < 0.8 * max(errors)


def test_channels_that_are_zero_and_filters() -> None:
    model = make("Llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, name).weight[:, 5] = 0
    before = copy.deepcopy(model)
    folded = smooth_(model, IDS, filter_fn=lambda m, n: n.endswith("0.self_attn.k_proj"))
    assert list(folded) == ["model.layers.0.input_layernorm"]
    norm, old = model.model.layers[0].input_layernorm, before.model.layers[0].input_layernorm
    assert norm.weight[3] == 0
    assert norm.weight[5] == old.weight[5]
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"smooth_: alpha must be in 0\.\.1, got 2"):
        smooth_(model, IDS, alpha=2)
