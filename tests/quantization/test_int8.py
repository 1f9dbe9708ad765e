"""Int8Config and SmoothQuantConfig: codes, static scales, what is folded, whole models."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import state_of
from torch import Tensor, nn

import effllm
from effllm import demo
from effllm.nn import W8A8Linear
from effllm.quantization import Granularity, Int8Config, SmoothQuantConfig, dequantize_, smooth_
from effllm.quantization.int8 import quantise_weight

TENSOR, CHANNEL, TOKEN = Granularity.tensor(), Granularity.channel(), Granularity.token()
STATIC = Int8Config(inputs=TENSOR, static=True)


def not_head(module: nn.Module, name: str) -> bool:
    return name != "lm_head"


@pytest.mark.parametrize("scales_per", ["tensor", "channel"])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (200, 300), (1, 129), (576, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_row_by_row(scales_per: Any, n: int, k: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(n, k) * torch.logspace(-3, 3, n)[:, None]).to(dtype)
    codes, scales = quantise_weight(weight, scales_per)
    assert codes.shape == (n, k)
    assert scales.shape == ((1,) if scales_per == "tensor" else (n, 1))
    assert scales.is_contiguous()
    for row in range(n):
        values = weight[row].float()
        sharing = weight.float() if scales_per == "tensor" else values
        scale = sharing.abs().max() / torch.tensor(127.0)
        assert scales.flatten()[0 if scales_per == "tensor" else row] == scale
        assert torch.equal(codes[row], (values / scale).round().to(torch.int8))


def calibration(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (4, 16), generator=generator)


@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL], ids=str)
def test_quantize_swaps_the_layers_of_a_model(granularity: Granularity) -> None:
    model = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 8))
    dense = copy.deepcopy(model)
    report = effllm.quantize_(model, Int8Config(granularity), progress=False)
    for layer, linear in zip(model[::2], dense[::2], strict=True):
        assert isinstance(layer, W8A8Linear)
        assert layer.scales_per == granularity.kind
        assert torch.equal(layer.bias, linear.bias)
    assert [(r.method, r.bits, r.granularity) for r in report.layers] == [
        ("int8", 8, str(granularity))
    ] * 2
    # Uniform values cost a twelfth of (1 / 127)^2 over a third of themselves.
    assert all(1e-5 < r.weight_error < 2e-5 for r in report.layers)
    x = torch.randn(9, 256)
    assert 1e-3 < (model(x) - dense(x)).norm() / dense(x).norm() < 0.02
    dequantize_(model, torch.float32)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("config", [STATIC, SmoothQuantConfig(inputs=TENSOR, static=True)])
def test_static_scales_are_of_the_largest_input(config: Int8Config, llama: Any) -> None:
    """For SmoothQuant of what is left after smoothing, as smooth_ leaves it in the first block."""
    ids = calibration(llama)
    smoothed = copy.deepcopy(llama)
    if isinstance(config, SmoothQuantConfig):
        smooth_(smoothed, ids, alpha=None, filter_fn=not_head, progress=False)
    seen: list[Tensor] = []
    projection = smoothed.model.layers[0].self_attn.q_proj
    projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        smoothed(ids)
    effllm.quantize_(llama, config, not_head, calibration=ids, progress=False)
    peak = torch.cat([x.flatten() for x in seen]).abs().max()
    layer = llama.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.input_scale, (peak / 127).view(1), rtol=1e-5, atol=0)
    layers = [m for m in llama.modules() if isinstance(m, W8A8Linear)]
    assert len(layers) == 21
    assert all(m.inputs_per == "tensor" and m.input_scale > 0 for m in layers)
    assert all(m.input_scale.stride() == (1,) for m in layers)


def test_zero_points_of_inputs_after_a_relu() -> None:
    """Half the steps, a quarter of the squared error; the weight's is the same."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(256, 64))
    x = torch.randn(100, 256)
    errors = []
    for symmetric in (True, False):
        rounded = copy.deepcopy(model)
        config = Int8Config(symmetric_inputs=symmetric)
        effllm.quantize_(rounded, config, progress=False)
        assert rounded[1].symmetric_inputs == symmetric
        exact = dequantize_(copy.deepcopy(rounded))(x)
        errors.append(float((rounded(x) - exact).square().sum()))
    assert errors[1] == pytest.approx(errors[0] * (127 / 255) ** 2, rel=0.1)


def test_a_layer_that_no_token_reaches_finds_its_scales_itself() -> None:
    codes = STATIC.quantise(torch.randn(8, 16), None)
    assert (codes.inputs_per, codes.input_scale) == ("token", None)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_smoothquant_is_smooth_then_int8(alpha: float | None, llama: Any) -> None:
    """The scales are smooth_'s in the first block, whose inputs are the same; then codes follow."""
    ids = calibration(llama)
    smoothed = copy.deepcopy(llama)
    folded = smooth_(smoothed, ids, alpha=alpha, filter_fn=not_head, progress=False)
    config = SmoothQuantConfig(alpha=alpha)
    report = effllm.quantize_(llama, config, not_head, calibration=ids, progress=False)
    assert report.folded == folded
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"):
        linear = smoothed.model.layers[0].get_submodule(name)
        layer = llama.model.layers[0].get_submodule(name)
        codes, scales = quantise_weight(linear.weight.detach(), "channel")
        assert (codes != layer.qweight).float().mean() < 1e-3
        torch.testing.assert_close(layer.scales, scales, rtol=1e-5, atol=0)


def test_a_run_goes_on_with_the_layers_it_has_stored(llama: Any, tmp_path: Path) -> None:
    ids = calibration(llama)
    mixture = {
        "*.self_attn.*": SmoothQuantConfig(inputs=TENSOR, static=True),
        "*.mlp.*": Int8Config(symmetric_inputs=False),
    }
    models = [copy.deepcopy(llama) for _ in range(2)]
    for model in models:
        effllm.quantize_(model, mixture, calibration=ids, state=tmp_path, progress=False)
    states = [state_of(model) for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    layer = models[1].model.layers[2]
    assert layer.self_attn.q_proj.inputs_per == "tensor"
    assert layer.mlp.up_proj.inputs_per == "token"
    assert not layer.mlp.up_proj.symmetric_inputs
    other = {"*.self_attn.*": SmoothQuantConfig(alpha=0.5), "*.mlp.*": Int8Config()}
    with pytest.raises(ValueError, match="is of a run with another model, config or calibration"):
        effllm.quantize_(llama, other, calibration=ids, state=tmp_path, progress=False)


@functools.cache
def demo_model() -> tuple[Any, Tensor, Tensor, float]:
    """The demo's model in bf16 with planted outliers, of which it computes the same, calibration
    and held-out tokens, and its perplexity over the latter."""
    model, tokenizer = demo.load()
    held_out = demo.held_out_tokens(tokenizer, context=512, limit=6144)
    model = demo.with_outliers(model, 64)
    return model, held_out[8:], held_out[:8], demo.perplexity(model, held_out[:8])


def ratio(config: Int8Config) -> float:
    """Perplexity of the model with outliers, with inputs rounded as well, over that in bf16."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    model, calibration, held_out, dense = demo_model()
    model = copy.deepcopy(model)
    effllm.quantize_(model, config, not_head, calibration=calibration, progress=False)
    return demo.perplexity(model, held_out) / dense


def test_smoothquant_is_within_a_percent_where_channels_stand_out() -> None:
    smoothed = ratio(SmoothQuantConfig())
    assert smoothed == pytest.approx(1, abs=0.01)
    assert smoothed != 1
    assert ratio(SmoothQuantConfig(inputs=TENSOR, static=True)) < 1.02
    assert ratio(Int8Config()) > 1.05


CONFIGS: list[tuple[type[Int8Config], dict[str, Any], str]] = [
    (
        Int8Config,
        {"granularity": Granularity.group(128)},
        r"granularity must be tensor\(\) or channel\(\), got group\(128\)",
    ),
    (Int8Config, {"inputs": None}, r"inputs must be tensor\(\) or token\(\), got None"),
    (Int8Config, {"inputs": TENSOR}, r"inputs=tensor\(\) is of static=True"),
    (Int8Config, {"static": True}, r"static is of inputs=tensor\(\), got token\(\)"),
    (
        Int8Config,
        {"symmetric_inputs": False, "inputs": TENSOR, "static": True},
        r"symmetric_inputs=False is of inputs=token\(\), got tensor\(\)",
    ),
    (SmoothQuantConfig, {"alpha": 1.5}, r"alpha must be in 0\.\.1, got 1.5"),
    (SmoothQuantConfig, {"alpha": float("nan")}, r"alpha must be in 0\.\.1, got nan"),
    (SmoothQuantConfig, {"static": True}, r"static is of inputs=tensor\(\), got token\(\)"),
]


@pytest.mark.parametrize(("kind", "options", "message"), CONFIGS)
def test_what_no_kernel_has(kind: type[Int8Config], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(**options)


@pytest.mark.parametrize("config", [STATIC, SmoothQuantConfig()])
def test_what_needs_calibration(config: Int8Config) -> None:
    with pytest.raises(ValueError, match=f"{type(config).__name__} needs calibration data"):
        effllm.quantize_(nn.Sequential(nn.Linear(8, 8)), config)
