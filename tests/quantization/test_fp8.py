"""Fp8Config: codes against loops over single weights, static scales, whole models."""

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
from effllm.nn import Fp8Linear, Int4Linear
from effllm.quantization import Fp8Config, Granularity, Int4Config, dequantize_
from effllm.quantization.fp8 import quantise_weight

TENSOR, CHANNEL, TOKEN = Granularity.tensor(), Granularity.channel(), Granularity.token()
BLOCK, GROUP = Granularity.block(128, 128), Granularity.group(128)
PAIRS = [(TENSOR, TENSOR), (CHANNEL, TOKEN), (BLOCK, GROUP)]
WORDS: Any = {TENSOR: "tensor", CHANNEL: "channel", BLOCK: "block"}


@pytest.mark.parametrize("granularity", WORDS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(128, 128), (200, 300), (1, 129), (576, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_tile_by_tile(
    granularity: Granularity, n: int, k: int, dtype: torch.dtype
) -> None:
    weight = (torch.randn(n, k) * torch.logspace(-3, 3, n)[:, None]).to(dtype)
    codes, scales = quantise_weight(weight, WORDS[granularity])
    assert codes.shape == (n, k)
    assert codes.is_contiguous()
    assert scales.stride() == torch.empty(scales.shape).stride()  # also where a size is 1
    rows, columns = granularity.weight_tile(n, k)
    tiles = scales.view(-(-n // rows), -(-k // columns))
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            tile = slice(rows * i, rows * (i + 1)), slice(columns * j, columns * (j + 1))
            values = weight[tile].float()
            scale = values.abs().max() / torch.tensor(448.0)
            assert tiles[i, j] == scale
            wanted = (values / scale).to(torch.float8_e4m3fn)
            assert torch.equal(codes[tile].float(), wanted.float())


def test_a_block_of_zeros_beside_one_of_numbers() -> None:
    weight = torch.zeros(256, 256)
    weight[0, 0] = 1
    codes, scales = quantise_weight(weight, "block")
    assert scales.flatten().tolist()[1:] == [1, 1, 1]
    assert codes.float().count_nonzero() == 1


@pytest.mark.parametrize(("granularity", "inputs"), [*PAIRS, (CHANNEL, None)], ids=str)
def test_quantize_swaps_the_layers_of_a_model(
    granularity: Granularity, inputs: Granularity | None
) -> None:
    model = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 8))
    dense = copy.deepcopy(model)
    report = effllm.quantize_(model, Fp8Config(granularity, inputs), progress=False)
    for layer, linear in zip(model[::2], dense[::2], strict=True):
        assert isinstance(layer, Fp8Linear)
        assert layer.scales_per == WORDS[granularity]
        assert torch.equal(layer.bias, linear.bias)
    assert [(r.method, r.bits, r.granularity) for r in report.layers] == [
        ("fp8", 8, str(granularity))
    ] * 2
    # Uniform values cost about 2^-4 / sqrt(12) / 1.4 of themselves each.
    assert all(1e-4 < r.weight_error < 2e-3 for r in report.layers)
    x = torch.randn(9, 256)
    error = (model(x) - dense(x)).norm() / dense(x).norm()
    assert 1e-3 < error < 0.1
    dequantize_(model, torch.float32)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.float32


def calibration(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (4, 16), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_scales_are_of_the_largest_input(llama: Any, dtype: torch.dtype) -> None:
    llama = llama.to(dtype)
    ids = calibration(llama)
    peaks: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            peaks[name] = max(peaks.get(name, 0.0), args[0].abs().max().item())

        return hook

    first = {"q_proj", "k_proj", "v_proj"}  # what comes before these is not quantised
    for name in first:
        projection = llama.model.layers[0].self_attn.get_submodule(name)
        projection.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        llama(ids)
    effllm.quantize_(
        llama,
        Fp8Config(TENSOR, TENSOR, static=True),
        lambda module, name: name != "lm_head",
        calibration=ids,
        progress=False,
    )
    for name in first:
        layer = llama.model.layers[0].self_attn.get_submodule(name)
        assert layer.input_scale.item() == (torch.tensor(peaks[name]) / torch.tensor(448.0)).item()
    layers = [m for m in llama.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == 21
    assert all(m.input_scale is not None and m.input_scale > 0 for m in layers)
    with torch.no_grad():
        assert llama(ids).logits.dtype == dtype


def test_a_run_goes_on_with_the_layers_it_has_stored(llama: Any, tmp_path: Path) -> None:
    ids = calibration(llama)
    mixture = {
        "*.self_attn.*": Fp8Config(TENSOR, TENSOR, static=True),
        "*.down_proj": Int4Config(32),
        "*.mlp.*": Fp8Config(BLOCK, GROUP),
    }
    models = [copy.deepcopy(llama) for _ in range(2)]
    for model in models:
        effllm.quantize_(model, mixture, calibration=ids, state=tmp_path, progress=False)
    states = [state_of(model) for model in models]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor.float(), states[1][name].float()), name
    layer = models[1].model.layers[2]
    assert layer.self_attn.q_proj.inputs_per == "tensor"
    assert layer.mlp.up_proj.inputs_per == "group"
    assert isinstance(layer.mlp.down_proj, Int4Linear)
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))


@functools.cache
def demo_model() -> tuple[Any, Tensor, float]:
    """The demo's model in bf16, held-out tokens, and its perplexity over them."""
    model, tokenizer = demo.load()
    held_out = demo.held_out_tokens(tokenizer, context=512, limit=4096)
    return model, held_out, demo.perplexity(model, held_out)


@pytest.mark.parametrize(("granularity", "inputs"), [*PAIRS, (CHANNEL, None)], ids=str)
def test_perplexity_is_within_half_a_percent(
    granularity: Granularity, inputs: Granularity | None
) -> None:
    """With inputs rounded as well."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    model, held_out, dense = demo_model()
    model = copy.deepcopy(model)
    config = Fp8Config(granularity, inputs)
    effllm.quantize_(model, config, lambda module, name: name != "lm_head", progress=False)
    found = demo.perplexity(model, held_out)
    assert found != dense
    assert found == pytest.approx(dense, rel=0.005)


CONFIGS = [
    (
        {"granularity": Granularity.group(128)},
        r"granularity must be tensor\(\), channel\(\) or block\(128, 128\), got group\(128\)",
    ),
    ({"granularity": Granularity.block(64, 64)}, r"granularity must be .*, got block\(64, 64\)"),
    (
        {"inputs": CHANNEL},
        r"inputs must be tensor\(\), token\(\), group\(128\) or None, got channel\(\)",
    ),
    ({"inputs": Granularity.group(64)}, r"inputs must be .*, got group\(64\)"),
    ({"static": True}, r"static is of inputs=tensor\(\), got token\(\)"),
    ({"inputs": None, "static": True}, r"static is of inputs=tensor\(\), got None"),
]


@pytest.mark.parametrize(("options", "message"), CONFIGS)
def test_what_no_kernel_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Fp8Config: {message}"):
        Fp8Config(**options)


def test_static_scales_need_calibration() -> None:
    with pytest.raises(ValueError, match="Fp8Config needs calibration data"):
        effllm.quantize_(nn.Sequential(nn.Linear(8, 8)), Fp8Config(TENSOR, TENSOR, static=True))
