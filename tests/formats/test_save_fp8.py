"""effllm.save of FP8 layers: float-quantized, as compressed-tensors has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import logits
from torch import Tensor

import effllm
from effllm.cli import main
from effllm.formats import CheckpointError, inspect
from effllm.nn import Fp8Linear
from effllm.quantization import Fp8Config, Granularity, Int4Config, dequantize_

TENSOR, CHANNEL, TOKEN = Granularity.tensor(), Granularity.channel(), Granularity.token()
BLOCK, GROUP = Granularity.block(128, 128), Granularity.group(128)
FP8 = "compressed-tensors-fp8"
Q = "model.layers.1.self_attn.q_proj"
CONFIGS = [
    Fp8Config(TENSOR, TENSOR),
    Fp8Config(TENSOR, TENSOR, static=True),
    Fp8Config(CHANNEL, TOKEN),
    Fp8Config(CHANNEL, None),
    Fp8Config(BLOCK, GROUP),
]
every_config = pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda c: f"{c.granularity.kind}-{'static' if c.static else c.inputs and c.inputs.kind}",
)


def not_head(module: Any, name: str) -> bool:
    return name != "lm_head"


def quantised(model: Any, config: Fp8Config) -> Any:
    ids = torch.arange(64).view(4, 16)
    calibration = ids if config.needs_calibration else None
    effllm.quantize_(model, config, not_head, calibration=calibration, progress=False)
    return model


@pytest.fixture
def wide() -> Any:
    """A Llama of more than one block each way: K = 160 and 200."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    from tiny_models import llama_config

    torch.manual_seed(0)
    config = llama_config(hidden_size=160, intermediate_size=200, num_hidden_layers=2)
    return transformers.LlamaForCausalLM(config).eval()


def quantization_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(config: Fp8Config, dtype: torch.dtype, wide: Any, tmp_path: Path) -> None:
    model = quantised(wide.to(dtype), config)
    effllm.save(model, tmp_path / "a", FP8, progress=False)
    again = effllm.load(tmp_path / "a", progress=False)
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert right[name].dtype == tensor.dtype, name
        assert torch.equal(right[name].float(), tensor.float()), name
    assert repr(again) == repr(model)
    model.model.rotary_emb = again.model.rotary_emb  # rounded by the cast above
    assert torch.equal(logits(again), logits(model))
    kernel = "fp8_weight_gemm" if config.inputs is None else "fp8_gemm"
    rows = {row.name: row for row in again.effllm_report.layers}
    assert (rows[Q].format, rows[Q].bits, rows[Q].kernel) == ("float-quantized", 8, kernel)
    assert {row.name: row.kernel for row in inspect(tmp_path / "a").layers} == {
        name: row.kernel for name, row in rows.items()
    }
    # And on: what has been loaded is saved as it was.
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", FP8]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].float(), before[name].float()) for name in before)
    assert quantization_config(tmp_path / "b") == quantization_config(tmp_path / "a")


def test_layers_of_several_kinds(wide: Any, tmp_path: Path) -> None:
    mixture = {"*.q_proj": CONFIGS[2], "*.mlp.*": CONFIGS[4], "*.o_proj": CONFIGS[3]}
    effllm.quantize_(wide, mixture, progress=False)
    effllm.save(wide, tmp_path / "a", FP8, progress=False)
    again = effllm.load(tmp_path / "a", progress=False)
    assert repr(again) == repr(wide)
    assert torch.equal(logits(again), logits(wide))
    found = {
        (group["weights"]["strategy"], (group["input_activations"] or {}).get("strategy"))
        for group in quantization_config(tmp_path / "a")["config_groups"].values()
    }
    assert found == {("channel", "token"), ("block", "group"), ("channel", None)}


# The config that asks for dense weights is merged with that of the file, which it warns of.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@every_config
def test_compressed_tensors_reads_what_we_write(
    config: Fp8Config, wide: Any, tmp_path: Path
) -> None:
    """Its own dense weights are those of our layers; what it says of inputs is what they do."""
    pytest.importorskip("compressed_tensors", reason="needs the extra effllm[formats]")
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = quantised(wide.to(torch.bfloat16), config)
    effllm.save(model, tmp_path / "a", FP8, progress=False)
    stored = QuantizationConfig.model_validate(quantization_config(tmp_path / "a"))
    (scheme,) = stored.config_groups.values()
    if config.inputs is None:
        assert scheme.input_activations is None
    else:
        word = {TENSOR: "tensor", TOKEN: "token", GROUP: "group"}[config.inputs]
        assert scheme.input_activations.strategy == word
        assert scheme.input_activations.dynamic is not config.static
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_scale", torch.zeros(1), "input_scale must be positive, got 0"),
        ("input_scale", torch.tensor([-1.0]), "input_scale must be positive, got -1"),
        ("input_scale", torch.tensor([float("inf")]), "input_scale"),
        ("input_scale", None, "input_scale' is missing"),
        ("weight_scale", torch.tensor([float("nan")]), "weight_scale"),
        ("weight_scale", torch.tensor([1e37]), "weights must be finite, got NaN or infinity"),
        ("weight", 0x7F, "weights must be finite, got NaN or infinity"),
        ("weight", 0xFF, "weights must be finite, got NaN or infinity"),
        ("weight_zero_point", torch.ones(1, dtype=torch.int8), "of e4m3 weights must be 0"),
    ],
)
def test_numbers_that_make_no_sense(
    name: str, value: Any, message: str, wide: Any, tmp_path: Path
) -> None:
    from formats_zoo import write_tensors

    effllm.save(quantised(wide, CONFIGS[1]), tmp_path / "a", FP8, progress=False)
    tensors: dict[str, Tensor] = load_file(tmp_path / "a" / "model.safetensors")
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    if value is None:
        del tensors[f"{Q}.{name}"]
    elif isinstance(value, int):
        tensors[f"{Q}.{name}"].view(torch.uint8)[3, 5] = value
    else:
        tensors[f"{Q}.{name}"] = value
    write_tensors(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match=message):
        effllm.load(tmp_path / "a", progress=False)


def test_zero_points_of_zero_are_none(wide: Any, tmp_path: Path) -> None:
    from formats_zoo import write_tensors

    effllm.save(quantised(wide, CONFIGS[1]), tmp_path / "a", FP8, progress=False)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    write_tensors(
        tmp_path / "a", tensors | {f"{Q}.weight_zero_point": torch.zeros(1, dtype=torch.int8)}
    )
    assert isinstance(effllm.load(tmp_path / "a", progress=False).get_submodule(Q), Fp8Linear)


def test_what_no_kernel_does_with_inputs_is_left_out(wide: Any, tmp_path: Path) -> None:
    """Weights alone are quantised then."""
    effllm.save(quantised(wide, CONFIGS[2]), tmp_path / "a", FP8, progress=False)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    for changes in (
        {"strategy": "group", "group_size": 64},
        {"dynamic": "local", "strategy": "tensor_group", "group_size": 16},
        {"dynamic": False},
        {"num_bits": 4},
        {"type": "int"},
    ):
        group["input_activations"] |= changes
        path.write_text(json.dumps(config))
        model = effllm.load(tmp_path / "a", progress=False)
        assert model.get_submodule(Q).inputs_per is None
        assert {row.kernel for row in model.effllm_report.layers if row.name == Q} == {
            "fp8_weight_gemm"
        }


def test_layers_of_other_kinds_are_refused(llama: Any, tmp_path: Path) -> None:
    effllm.quantize_(llama, {"*.q_proj": Fp8Config(), "*.k_proj": Int4Config(32)}, progress=False)
    for format, other in ((FP8, "Int4Linear"), ("compressed-tensors", "Fp8Linear")):
        with pytest.raises(ValueError, match=f"{format} holds no {other}, only"):
            effllm.save(llama, tmp_path / "a", format, progress=False)


def test_gguf_rounds_the_weights_that_codes_stand_for(llama: Any, tmp_path: Path) -> None:
    effllm.quantize_(llama, Fp8Config(CHANNEL, None), not_head, progress=False)
    effllm.save(llama, tmp_path / "a.gguf", "gguf-f32", progress=False)
    again = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    torch.testing.assert_close(logits(again), logits(llama), rtol=1e-4, atol=1e-4)


def test_dense_checkpoints_are_converted(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "dense")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "fp8"), "--format", FP8]
    assert main(["convert", *arguments]) == 0
    model = effllm.load(tmp_path / "fp8", dtype=torch.float32, progress=False)
    assert model.get_submodule(Q).inputs_per == "token"
    torch.testing.assert_close(
        model.get_submodule(Q).weight, llama.get_submodule(Q).weight, rtol=1 / 16, atol=1e-4
    )
