"""AWQ: what its scales may go into, that they change nothing, and that they help."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_families import IDS, make, spread_out
from torch import Tensor, nn

import effllm
from effllm.quantization import AwqConfig, Granularity, LinearConfig, smooth_
from effllm.quantization.awq import quantise_clipped, search_scales
from effllm.quantization.folding import Fold
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.uniform import Grid

CONFIG = AwqConfig(3, Granularity.group(32))


@pytest.mark.parametrize(
    ("family", "folded"),
    [
        # Every norm, value heads although they serve two query heads, and the linear factor.
        ("Llama", {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"}),
        (
            "Llama, as many value heads",
            {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"},
        ),
        ("Qwen3", {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"}),
        # Its norms multiply by 1 + weight.
        ("Gemma2", {"input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"}),
        # Queries, keys and values are one layer, and between up and down is a curve.
        ("GPTNeoX", {"input_layernorm", "post_attention_layernorm"}),
        # ReLU keeps scales: what is found needs no name.
        ("OPT", {"self_attn_layer_norm", "v_proj", "final_layer_norm", "fc1"}),
    ],
)
def test_scales_go_where_they_change_nothing(
    family: str, folded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model whose layers are left as they are after scaling computes what it did."""
    model = make(family)
    before = model(IDS).logits
    weights = {n: m.weight.clone() for n, m in model.named_modules() if type(m) is nn.Linear}
    scaled: dict[str, Tensor] = {}

    def keep(self: AwqConfig, weight: Tensor, inputs: Any) -> Any:
        scaled[str(len(scaled))] = weight.clone()
        return LinearConfig(4, Granularity.group(32)).quantise(weight, None)

    monkeypatch.setattr(AwqConfig, "quantise", keep)
    report = effllm.quantize_(
        model, CONFIG, lambda m, n: "layers." in n, calibration=IDS, progress=False
    )
    found = {name.rsplit(".", 1)[-1] for name in report.folded}
    assert found == folded
    moved = 0
    for result, weight in zip(report.layers, scaled.values(), strict=True):
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        dense.weight = nn.Parameter(weight)
        dense.bias = model.get_submodule(result.name).bias
        moved += not torch.allclose(weight, weights[result.name], rtol=0.05)
        model.set_submodule(result.name, dense)
    assert moved >= len(report.layers) // 2
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_left_out_is_scaled_with_the_others(llama: Any) -> None:
    spread_out(llama)
    plain = copy.deepcopy(llama)

    def no_key(module: nn.Module, name: str) -> bool:
        return name.endswith(("0.self_attn.q_proj", "0.self_attn.v_proj"))

    effllm.quantize_(llama, CONFIG, no_key, calibration=IDS, progress=False)
    x = plain.model.embed_tokens(IDS)
    ours, other = llama.model.layers[0], plain.model.layers[0]
    key = ours.self_attn.k_proj(ours.input_layernorm(x))
    assert type(ours.self_attn.k_proj) is nn.Linear
    assert not torch.allclose(ours.input_layernorm.weight, other.input_layernorm.weight)
    torch.testing.assert_close(
        key, other.self_attn.k_proj(other.input_layernorm(x)), rtol=1e-4, atol=1e-4
    )


def test_weights_that_are_shared_stay() -> None:
    """A head on the embedding's tensor gets the norm's output as well: scales have no place."""

    class Two(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(97, 64), nn.LayerNorm(64)
            self.head, self.score = nn.Linear(64, 97, bias=False), nn.Linear(64, 32)
            nn.init.normal_(self.norm.weight, 0, 3)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.embed(ids))
            return torch.cat([self.head(x), self.score(x)], -1)

    for tied in (False, True):
        model = Two(tied)
        before = model.embed.weight.clone()
        logits = model(IDS)[..., :97].detach()
        report = effllm.quantize_(
            model, CONFIG, lambda m, name: name == "score", calibration=IDS, progress=False
        )
        assert report.folded == ({} if tied else {"norm": ["head", "score"]})
        assert torch.equal(model.embed.weight, before)
        torch.testing.assert_close(model(IDS)[..., :97], logits, rtol=1e-3, atol=1e-3)
        # Nor have they where the norm's output goes into a layer that is quantised already.
        assert smooth_(model, IDS, progress=False) == {}
        assert ("norm" in smooth_(Two(tied), IDS, progress=False)) == (not tied)


def inputs_of(x: Tensor) -> InputStatistics:
    inputs = InputStatistics(x.shape[-1], dtype=torch.float64)
    inputs.add(x)
    return inputs


def norm_fold(k: int, heads: tuple[int, int] | None = None) -> Fold:
    return Fold(nn.LayerNorm(k), [nn.Linear(k, 8)], heads or (1, k))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_finds_the_least_error(symmetric: bool, bits: int) -> None:
    """Against all candidates of the paper, with outputs computed from the tokens themselves."""
    x = torch.randn(300, 64) * torch.randn(64).mul(1.5).exp()
    # The second layer counts as much as the first, although its outputs are a thousandth.
    weights = [torch.randn(24, 64), torch.randn(8, 64) * torch.rand(8, 64) * 1e-3]
    granularity = Granularity.group(32)
    config = LinearConfig(bits, granularity, symmetric)

    def error(scales: Tensor) -> float:
        total = 0.0
        for weight in weights:
            dense = config.quantise(weight * scales, None).dense() / scales
            outputs = x.double() @ weight.double().T
            error = (x.double() @ (dense - weight).double().T).square().sum()
            total += float(error / outputs.square().sum())
        return total

    found = search_scales(
        weights, inputs_of(x), norm_fold(64), Grid(bits, symmetric), granularity, 20
    )
    candidates = []
    for step in range(21):
        scales = x.abs().mean(0) ** (step / 20)
        candidates.append(error(scales / (scales.max() * scales.min()).sqrt()))
    assert error(found) <= min(candidates) * 1.001
    assert error(found) < 0.8 * error(torch.ones(64))


def test_heads_that_share_values_share_scales() -> None:
    fold = norm_fold(16, (2, 4))  # 2 key-value heads of 4, each for 2 query heads: K = 16, P = 8
    scales = torch.arange(8.0)
    spread = fold.spread(scales)
    assert spread.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert torch.equal(fold.gather(spread), scales)


@pytest.mark.parametrize("kind", ["zero", "dead", "one", "changing signs", "none"])
def test_inputs_that_say_little(kind: str) -> None:
    x, weight = torch.randn(50, 64), torch.randn(8, 64)
    weight[3] = 0
    if kind == "changing signs":
        x[25:] = -x[:25]  # means of exactly 0
    elif kind == "dead":
        x[:, 5] = 0
    else:
        x = {"zero": x * 0, "one": x[:1], "none": x[:0]}[kind]
    scales = search_scales(
        [weight], inputs_of(x), norm_fold(64), Grid(4, False), Granularity.group(32), 20
    )
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    if kind in ("zero", "none"):
        assert torch.equal(scales, torch.ones(64))
    found = quantise_clipped(weight, inputs_of(x), Grid(4, False), Granularity.group(32))
    assert torch.isfinite(found.dense()).all()
    assert torch.equal(found.dense()[3], torch.zeros(64))


@pytest.mark.parametrize(
    "granularity",
    [Granularity.channel(), Granularity.group(32), Granularity.block(3, 64), Granularity.tensor()],
    ids=str,
)
def test_clipping_lowers_the_error_of_the_output(granularity: Granularity) -> None:
    """That of each group alone, which for a channel is the whole output."""
    x = torch.randn(300, 16) @ torch.randn(16, 100) * torch.randn(100).exp()
    weight = torch.randn(7, 100)
    _, columns = granularity.weight_tile(7, 100)

    def error(dense: Tensor) -> float:
        parts = (dense - weight).double().detach()
        return sum(
            float((x[:, j : j + columns].double() @ parts[:, j : j + columns].T).square().sum())
            for j in range(0, 100, columns)
        )

    for symmetric in (False, True):
        ours = quantise_clipped(weight, inputs_of(x), Grid(3, symmetric), granularity).dense()
        others = [
            LinearConfig(3, granularity, symmetric, clip).quantise(weight, None).dense()
            for clip in (False, True)
        ]
        assert error(ours) < min(error(other) for other in others)


@torch.no_grad()
def test_better_than_rounding(llama: Any) -> None:
    model = spread_out(llama)
    before = model(IDS).logits
    distances = []
    for config in (LinearConfig(3, Granularity.group(32), symmetric=False), CONFIG):
        other = copy.deepcopy(model)
        effllm.quantize_(other, config, calibration=IDS, progress=False)
        distances.append(float((other(IDS).logits - before).square().mean()))
    assert distances[1] < 0.8 * distances[0]
    with pytest.raises(ValueError, match="AwqConfig: steps must be at least 1, got 0"):
        AwqConfig(steps=0)
