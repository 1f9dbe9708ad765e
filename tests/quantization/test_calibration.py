"""Calibration block by block against passes through the whole model, one for each layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import Interrupted, assert_equal, state_of
from tiny_models import llama_config
from torch import Tensor, nn

import effllm
from effllm.nn import Int4Linear
from effllm.quantization import GptqConfig, Granularity, KMeansConfig, LinearConfig
from effllm.quantization.statistics import InputStatistics

IDS = torch.arange(4 * 24).view(4, 24) * 37 % 97
ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = GptqConfig(3, Granularity.group(32))


def no_head(module: nn.Module, name: str) -> bool:
    return name != "lm_head"


def one_by_one(model: Any, config: Any, names: list[str], runs: list[dict[str, Any]]) -> None:
    """Each layer after all before it, on its inputs in passes through the whole model."""
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    inputs: dict[str, InputStatistics] = {}
    for name in names:
        linear = model.get_submodule(name)
        block, last = name.rsplit(".", 1)
        # Layers that share their input get what it was before the first of them changed.
        inputs[name] = inputs.get(f"{block}.{shared.get(last)}") or InputStatistics(
            linear.in_features
        )
        if last not in shared:
            handle = linear.register_forward_pre_hook(
                lambda module, args, into=inputs[name]: into.add(args[0])
            )
            with torch.no_grad():
                for run in runs:
                    model(**run, use_cache=False)
            handle.remove()
        with torch.no_grad():
            linear.weight.copy_(config.quantise(linear.weight, inputs[name]).dense())


def assert_near(model: Any, expected: Any, names: list[str]) -> None:
    """Rounding errors may tip single codes, and GPTQ then those that follow."""
    for name in names:
        ours, other = model.get_submodule(name).weight, expected.get_submodule(name).weight
        assert ((ours - other).abs() > 1e-4).double().mean() < 0.02, name


def names_of(model: Any) -> list[str]:
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    blocks = [name for name in linears if "layers." in name]
    return sorted(blocks, key=lambda n: (n.split(".")[2], ORDER.index(n.rsplit(".")[-1])))


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_as_layer_by_layer_through_the_whole_model(family: str, llama: Any) -> None:
    """Gemma 2 gives every other block another mask."""
    import transformers

    model = llama
    if family == "Gemma2":
        options = llama_config(sliding_window=5, num_hidden_layers=2).to_dict()
        names = ("model_type", "architectures", "rope_parameters", "layer_types", "mlp_bias")
        for name in names:
            options.pop(name, None)
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**options)).eval()
    expected = copy.deepcopy(model)
    names = names_of(model)
    one_by_one(expected, CONFIG, names, [{"input_ids": IDS}])
    report = effllm.quantize_(model, CONFIG, no_head, calibration=IDS, progress=False)
    assert [layer.name for layer in report.layers] == names
    assert_near(model, expected, names)
    for layer in report.layers:
        assert layer.tokens == IDS.numel()
        assert layer.output_error is not None
        assert 0 < layer.output_error < 0.2


def test_the_error_that_is_reported(llama: Any) -> None:
    """Of the first layer's output, which nothing before it has changed."""
    before = copy.deepcopy(llama)
    config = LinearConfig(3, Granularity.group(32))
    report = effllm.quantize_(llama, config, calibration=IDS, progress=False)
    x = before.model.layers[0].input_layernorm(before.model.embed_tokens(IDS)).detach()
    name = "model.layers.0.self_attn.q_proj"
    out = before.get_submodule(name)(x).detach()
    error = (llama.get_submodule(name)(x) - out).square().sum() / out.square().sum()
    assert report.layers[0].name == name
    assert report.layers[0].output_error == pytest.approx(float(error), rel=1e-3)


def test_the_head_comes_last_on_what_the_quantised_blocks_give(llama: Any) -> None:
    blocks = copy.deepcopy(llama)
    effllm.quantize_(blocks, CONFIG, no_head, calibration=IDS, progress=False)
    report = effllm.quantize_(llama, CONFIG, calibration=IDS, progress=False)
    assert report.layers[-1].name == "lm_head"
    inputs = InputStatistics(64)
    with torch.no_grad():
        inputs.add(blocks.model(IDS).last_hidden_state)
    expected = CONFIG.quantise(blocks.lm_head.weight.detach(), inputs).dense()
    assert ((llama.lm_head.weight - expected).abs() > 1e-4).double().mean() < 0.02


def test_padding_does_not_count(llama: Any) -> None:
    """Nor does how the tokens come in batches, one by one for instance."""
    padded = torch.full((2, 30), 96)
    mask = torch.zeros(2, 30, dtype=torch.long)
    for row, length in enumerate((24, 11)):
        padded[row, :length] = IDS[row, :length]
        mask[row, :length] = 1
    apart = [IDS[:1], IDS[1:2, :11]]
    layers = []
    for data in ([{"input_ids": padded, "attention_mask": mask}], apart, apart[::-1]):
        model = copy.deepcopy(llama)
        report = effllm.quantize_(model, CONFIG, calibration=data, progress=False)
        assert {layer.tokens for layer in report.layers} == {35}
        layers.append([layer.output_error for layer in report.layers])
    for other in layers[1:]:
        assert other == pytest.approx(layers[0], rel=0.1)


def test_one_token(llama: Any) -> None:
    report = effllm.quantize_(llama, CONFIG, calibration=IDS[:1, :1], progress=False)
    assert len(report.layers) == 3 * 7 + 1
    assert torch.isfinite(llama(IDS).logits).all()


def test_modes_and_hooks_are_left_as_they_were(llama: Any) -> None:
    llama.train()
    llama.model.layers[1].eval()
    effllm.quantize_(llama, CONFIG, calibration=IDS, progress=False)
    assert llama.training
    assert llama.model.layers[0].mlp.up_proj.training
    assert not llama.model.layers[1].mlp.up_proj.training
    for module in llama.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


# -- models of other shapes -----------------------------------------------------------------------


class Chain(nn.Module):
    """Blocks of one linear layer each, called in one of the ways that models have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList([Block(how) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how == "keyword":
                x = layer(hidden_states=x, scale=2.0)
            elif self.how == "tuple":
                x, _ = layer(x, 2.0)
            elif self.how == "between":
                x = layer(x * 1.5, 2.0)
            else:
                x = layer(x, scale=2.0)
        return x


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.how = how

    def forward(self, hidden_states: Tensor, scale: float) -> Any:
        out = hidden_states + scale * self.linear(hidden_states).relu()
        return (out, None) if self.how == "tuple" else out


@pytest.mark.parametrize("how", ["plain", "keyword", "tuple", "between"])
def test_ways_to_call_blocks(how: str) -> None:
    """A model that computes between its blocks is calibrated as a whole."""
    model = Chain(how)
    expected = copy.deepcopy(model)
    data = [torch.randn(2, 9, 64), torch.randn(1, 1, 64)]
    effllm.quantize_(model, CONFIG, calibration=data, progress=False)
    for i, layer in enumerate(expected.layers):
        inputs = InputStatistics(64)
        layer.linear.register_forward_pre_hook(lambda m, args, into=inputs: into.add(args[0]))
        with torch.no_grad():
            for batch in data:
                expected(batch)
            found = CONFIG.quantise(layer.linear.weight, inputs)
            layer.linear.weight.copy_(found.dense())
        torch.testing.assert_close(model.layers[i].linear.weight, found.dense())


def test_a_list_of_linear_layers_and_one_layer_in_two_places() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
            self.again = self.layers[0]
            self.unused = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return self.again(x)

    model = Mlp()
    report = effllm.quantize_(model, CONFIG, calibration=[torch.randn(50, 64)], progress=False)
    assert model.again is model.layers[0]
    assert all(isinstance(m, Int4Linear) for m in (*model.layers, model.unused))
    assert {layer.name: layer.tokens for layer in report.layers} == {
        "layers.0": 100,
        "layers.1": 50,
        "unused": 0,
    }


# -- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 3, 7, 16, 21])
@pytest.mark.parametrize("where", ["same process", "another process"])
def test_an_interrupted_run_goes_on(where: str, calls: int, llama: Any, tmp_path: Path) -> None:
    fresh, whole = copy.deepcopy(llama), copy.deepcopy(llama)
    config = Interrupted(3, Granularity.group(32))
    Interrupted.left = 10**9
    full = effllm.quantize_(whole, config, calibration=IDS, progress=False)
    Interrupted.left = calls
    with pytest.raises(KeyboardInterrupt):
        effllm.quantize_(llama, config, calibration=IDS, state=tmp_path, progress=False)
    # Blocks are done or untouched, and the model runs.
    assert torch.isfinite(llama(IDS).logits).all()
    kinds = [
        {type(layer.mlp.up_proj), type(layer.self_attn.q_proj)} for layer in llama.model.layers
    ]
    done = calls // 7
    assert kinds == [{Int4Linear}] * done + [{nn.Linear}] * (3 - done)
    assert len(list(tmp_path.iterdir())) == done

    Interrupted.left = 22 - 7 * done
    again = llama if where == "same process" else fresh
    report = effllm.quantize_(again, config, calibration=IDS, state=tmp_path, progress=False)
    assert Interrupted.left == 0
    assert_equal(state_of(again), state_of(whole))
    if where == "another process":
        assert report == full


def test_codebooks_and_mixtures_are_resumed(llama: Any, tmp_path: Path) -> None:
    codebooks = KMeansConfig(3, Granularity.group(32), weighted=True)
    permuted = GptqConfig(4, Granularity.group(32), symmetric=False, static_groups=False)
    config = {"*.self_attn.*": codebooks, "*.mlp.*": permuted}
    other = copy.deepcopy(llama)
    first = effllm.quantize_(llama, config, calibration=IDS, state=tmp_path, progress=False)
    second = effllm.quantize_(other, config, calibration=IDS, state=tmp_path, progress=False)
    assert first == second
    assert_equal(state_of(llama), state_of(other))
    assert [str(m) for m in llama.modules()] == [str(m) for m in other.modules()]


def test_a_state_of_another_run_is_refused(llama: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(llama)
    changed = copy.deepcopy(llama)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    effllm.quantize_(llama, CONFIG, no_head, calibration=IDS, state=tmp_path, progress=False)
    for model, config, ids in (
        (other, GptqConfig(3, Granularity.group(64)), IDS),
        (other, CONFIG, IDS[:3]),
        (changed, CONFIG, IDS),
    ):
        with pytest.raises(ValueError, match=r"part-0000\.safetensors is of a run with another"):
            effllm.quantize_(
                model, config, no_head, calibration=ids, state=tmp_path, progress=False
            )
    with pytest.raises(ValueError, match="state is of runs with calibration, got none"):
        effllm.quantize_(other, LinearConfig(), state=tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(2, 3), r"must be token ids \[B, T\] .*, got a torch.float32 tensor \[2, 3\]"),
        (torch.ones(3, dtype=torch.long), r"got a torch.int64 tensor \[3\]"),
        ([], "calibration holds no tokens"),
        (torch.ones(2, 0, dtype=torch.long), "calibration holds no tokens"),
        ([IDS, "text"], "must be a tensor or a mapping of the model's arguments, got str"),
    ],
)
def test_errors(data: Any, message: str, llama: Any) -> None:
    with pytest.raises(ValueError, match=message):
        effllm.quantize_(llama, CONFIG, calibration=data)
