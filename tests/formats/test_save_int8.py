"""effllm.save and load of W8A8 and int8 layers: int-quantized, as compressed-tensors has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_zoo import write_tensors
from safetensors.torch import load_file
from tiny_models import logits
from torch import Tensor, nn

import effllm
from effllm import ops
from effllm.cli import main
from effllm.formats import CheckpointError, inspect
from effllm.nn import Int8Linear, W8A8Linear
from effllm.quantization import (
    Fp8Config,
    Granularity,
    Int8Config,
    LinearConfig,
    Method,
    dequantize_,
)
from effllm.testing import hostile

TENSOR, CHANNEL = Granularity.tensor(), Granularity.channel()
INT8 = "compressed-tensors-int8"
Q = "model.layers.1.self_attn.q_proj"
CONFIGS = [
    Int8Config(),
    Int8Config(TENSOR),
    Int8Config(CHANNEL, TENSOR, static=True),
    Int8Config(TENSOR, TENSOR, static=True),
    Int8Config(symmetric_inputs=False),
]
WEIGHTS = [LinearConfig(8, CHANNEL), LinearConfig(8, Granularity.group(128))]
every_config = pytest.mark.parametrize(
    "config",
    [*CONFIGS, *WEIGHTS],
    ids=lambda c: (
        f"{c.name}-{c.granularity.kind}{'-static' if c.needs_calibration else ''}"
        f"{'' if getattr(c, 'symmetric_inputs', True) else '-zeros'}"
    ),
)


@pytest.fixture
def llama() -> Any:
    """A Llama of more than one group: K = 256 and 384."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    from tiny_models import llama_config

    torch.manual_seed(0)
    config = llama_config(hidden_size=256, intermediate_size=384, num_hidden_layers=2, head_dim=64)
    return transformers.LlamaForCausalLM(config).eval()


def not_head(module: Any, name: str) -> bool:
    return name != "lm_head"


def quantised(model: Any, config: Method) -> Any:
    ids = torch.arange(64).view(4, 16)
    calibration = ids if config.needs_calibration else None
    effllm.quantize_(model, config, not_head, calibration=calibration, progress=False)
    return model


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(config: Method, dtype: torch.dtype, llama: Any, tmp_path: Path) -> None:
    model = quantised(llama.to(dtype), config)
    effllm.save(model, tmp_path / "a", INT8, progress=False)
    again = effllm.load(tmp_path / "a", progress=False)
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert right[name].dtype == tensor.dtype, name
        assert torch.equal(right[name], tensor), name
    assert repr(again) == repr(model)
    model.model.rotary_emb = again.model.rotary_emb  # rounded by the cast above
    assert torch.equal(logits(again), logits(model))
    rows = {row.name: row for row in again.effllm_report.layers}
    kernel = "int8_weight_gemm" if config in WEIGHTS else "int8_gemm"
    assert (rows[Q].format, rows[Q].bits, rows[Q].kernel) == ("int-quantized", 8, kernel)
    assert {row.name: row.kernel for row in inspect(tmp_path / "a").layers} == {
        name: row.kernel for name, row in rows.items()
    }
    # And on: what has been loaded is saved as it was.
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", INT8]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    written, found = (config_of(tmp_path / name)["quantization_config"] for name in "ab")
    assert written == found


# The config that asks for dense weights is merged with that of the file, which it warns of.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@every_config
def test_compressed_tensors_reads_what_we_write(config: Method, llama: Any, tmp_path: Path) -> None:
    """Its own dense weights are those of our layers; what it says of inputs is what they do."""
    pytest.importorskip("compressed_tensors", reason="needs the extra effllm[formats]")
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = quantised(llama.to(torch.bfloat16), config)
    effllm.save(model, tmp_path / "a", INT8, progress=False)
    stored = QuantizationConfig.model_validate(config_of(tmp_path / "a")["quantization_config"])
    (scheme,) = stored.config_groups.values()
    assert (scheme.weights.type, scheme.weights.num_bits) == ("int", 8)
    if isinstance(config, Int8Config):
        assert scheme.input_activations.strategy == ("tensor" if config.static else "token")
        assert scheme.input_activations.dynamic is not config.static
        assert scheme.input_activations.symmetric is config.symmetric_inputs
    else:
        assert scheme.input_activations is None
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a",
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    dequantize_(model, torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            weight = theirs.get_submodule(name).weight
            torch.testing.assert_close(weight, module.weight, rtol=2**-7, atol=0, msg=name)


def test_zero_points_are_those_of_compressed_tensors() -> None:
    """What its models compute of inputs that are not symmetric, per token: to the bit."""
    pytest.importorskip("compressed_tensors", reason="needs the extra effllm[formats]")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = hostile.normal(200, 300)
    x[50:100], x[100:150] = x[50:100].abs(), -x[100:150].abs()
    args = QuantizationArgs(num_bits=8, symmetric=False, strategy="token", dynamic=True)
    scales, zeros = calculate_qparams(x.amin(-1, True), x.amax(-1, True), args)
    theirs = (quantize(x, scales, zeros, args, dtype=torch.int8), scales, zeros)
    for ours, wanted in zip(ops.int8_quantize_asymmetric(x), theirs, strict=True):
        assert torch.equal(ours, wanted)


def test_from_pretrained_gives_the_same_layers(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantised(llama, CONFIGS[2])
    effllm.save(model, tmp_path / "a", INT8, progress=False)
    before = effllm.integrations.quantizer_use()
    effllm.integrations.use_quantizer("always")
    try:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    finally:
        effllm.integrations.use_quantizer(before)
    assert isinstance(again.get_submodule(Q), W8A8Linear)
    assert repr(again.model.layers) == repr(model.model.layers)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_scale", torch.zeros(1), "input_scale must be positive, got 0"),
        ("input_scale", torch.tensor([float("inf")]), "input_scale"),
        ("input_scale", None, "input_scale' is missing"),
        ("weight_scale", torch.tensor([float("nan")]), "weight_scale"),
        ("weight_scale", torch.tensor([1e37]), "weights must be finite, got NaN or infinity"),
        ("weight_zero_point", torch.ones(1, dtype=torch.int8), "of symmetric int8 weights must"),
    ],
)
def test_numbers_that_make_no_sense(
    name: str, value: Any, message: str, llama: Any, tmp_path: Path
) -> None:
    effllm.save(quantised(llama, CONFIGS[3]), tmp_path / "a", INT8, progress=False)
    tensors: dict[str, Tensor] = load_file(tmp_path / "a" / "model.safetensors")
    if value is None:
        del tensors[f"{Q}.{name}"]
    else:
        tensors[f"{Q}.{name}"] = value
    write_tensors(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match=message):
        effllm.load(tmp_path / "a", progress=False)


def test_the_lowest_code_is_a_number(llama: Any, tmp_path: Path) -> None:
    """-128, which other quantisers write."""
    effllm.save(quantised(llama, CONFIGS[0]), tmp_path / "a", INT8, progress=False)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors[f"{Q}.weight"][3, 5] = -128
    write_tensors(tmp_path / "a", tensors)
    layer = effllm.load(tmp_path / "a", progress=False).get_submodule(Q)
    assert layer.weight[3, 5] == -128 * layer.scales[3, 0]


def test_what_no_kernel_does_with_inputs_is_left_out(llama: Any, tmp_path: Path) -> None:
    """Weights alone are quantised then."""
    model = quantised(llama, CONFIGS[0])
    effllm.save(model, tmp_path / "a", INT8, progress=False)
    path = tmp_path / "a" / "config.json"
    text = path.read_text()
    for changes in (
        {"strategy": "tensor"},
        {"strategy": "group", "group_size": 64},
        {"dynamic": False},
        {"symmetric": False, "strategy": "tensor", "dynamic": False},
        {"num_bits": 4},
        {"type": "float"},
    ):
        config = json.loads(text)
        (group,) = config["quantization_config"]["config_groups"].values()
        group["input_activations"] |= changes
        path.write_text(json.dumps(config))
        loaded = effllm.load(tmp_path / "a", progress=False)
        layer = loaded.get_submodule(Q)
        assert isinstance(layer, Int8Linear)
        assert torch.equal(layer.weight, model.get_submodule(Q).weight)
        assert {row.kernel for row in loaded.effllm_report.layers if row.name == Q} == {
            "int8_weight_gemm"
        }


def test_short_groups_are_refused(llama: Any, tmp_path: Path) -> None:
    llama.model.layers[1].mlp.down_proj = nn.Linear(200, 256, bias=False)
    effllm.quantize_(llama, WEIGHTS[1], not_head, progress=False)
    with pytest.raises(ValueError, match=r"down_proj': .* got K = 200, group_size = 128"):
        effllm.save(llama, tmp_path / "a", INT8, progress=False)
    assert not (tmp_path / "a").exists()


def test_layers_of_other_kinds_are_refused(llama: Any, tmp_path: Path) -> None:
    effllm.quantize_(llama, {"*.q_proj": Fp8Config(), "*.k_proj": Int8Config()}, progress=False)
    for format, other in ((INT8, "Fp8Linear"), ("compressed-tensors-fp8", "W8A8Linear")):
        with pytest.raises(ValueError, match=f"{format} holds no {other}, only"):
            effllm.save(llama, tmp_path / "a", format, progress=False)


def test_dense_checkpoints_are_converted(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "dense")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "int8"), "--format", INT8]
    assert main(["convert", *arguments]) == 0
    layer = effllm.load(tmp_path / "int8", dtype=torch.float32, progress=False).get_submodule(Q)
    assert layer.inputs_per == "token"
    assert ((layer.weight - llama.get_submodule(Q).weight).abs() <= layer.scales * 0.5001).all()
