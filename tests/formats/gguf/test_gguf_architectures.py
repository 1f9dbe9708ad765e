"""Qwen2, Qwen3, Gemma, Gemma 2 and Mistral: files of the gguf package give the logits of
transformers, and what we write is what it would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounded_models import rounded
from tiny_models import logits

import effllm
from effllm.formats import CheckpointError
from effllm.formats.gguf import (
    GgufError,
    GgufFile,
    TensorType,
    config_metadata,
    read_config,
    write_model,
)
from effllm.formats.gguf.architecture import slots
from effllm.nn import Int4Linear, Lut4Linear

MakeModel = Callable[..., Any]
TANH = "gelu_pytorch_tanh"

# model type -> architecture in the file, changes to the config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32, "hidden_act": TANH, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "hidden_activation": TANH,
            "tie_word_embeddings": True,
            "sliding_window": 4,  # of 12 tokens
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "mistral": ("llama", {"sliding_window": None}),
}


def interleaved(weight: Any, heads: int) -> Any:
    """Rows in the order of ggml's llama, by a plain loop."""
    half = len(weight) // heads // 2
    order = [
        2 * h * half + part * half + j for h in range(heads) for j in range(half) for part in (0, 1)
    ]
    return weight[order]


def by_the_package(model: Any, architecture: str, path: Path, kind: str) -> GgufFile:
    """The file as llama.cpp's converter makes it: its names, its keys, its changes to weights."""
    gguf = pytest.importorskip("gguf", reason="needs the extra effllm[formats] (gguf)")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture not in ("llama", "qwen2"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    kinds = gguf.GGMLQuantizationType
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = weight.numpy()
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads and architecture == "llama":
            data = interleaved(data, heads)
        if "gemma" in architecture and name.endswith("norm.weight"):
            data = data + 1
        stored = kinds[kind] if data.ndim == 2 else kinds.F32
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")),
            gguf.quants.quantize(data, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("model_type", MODELS)
def test_files_of_the_package_give_the_logits_of_transformers(
    model_type: str, kind: str, make_model: MakeModel, tmp_path: Path
) -> None:
    architecture, changes = MODELS[model_type]
    model = make_model(model_type, **changes)
    file = by_the_package(model, architecture, tmp_path / "a.gguf", kind)
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    assert loaded.config.model_type == ("llama" if model_type == "mistral" else model_type)
    packed = [name for name, module in loaded.named_modules() if isinstance(module, Int4Linear)]
    assert len(packed) == (14 + ("lm_head" in packed) if kind == "Q4_0" else 0)
    expected = logits(rounded(make_model(model_type, **changes), TensorType[kind]))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)

    write_model(tmp_path / "b.gguf", model, TensorType[kind])
    ours = GgufFile(tmp_path / "b.gguf")
    assert ours.tensors.keys() == file.tensors.keys()
    for name, info in file.tensors.items():
        assert ours.tensors[name].shape == info.shape, name
        assert torch.equal(ours.raw(name), file.raw(name)), name
    theirs = {key: value for key, value in file.metadata.items() if architecture in key}
    assert theirs.items() <= ours.metadata.items()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_models_come_back_the_same(
    model_type: str, tied: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    changes = MODELS[model_type][1] | {"tie_word_embeddings": tied}
    model = make_model(model_type, **changes)
    write_model(tmp_path / "a.gguf", model, TensorType.F32)
    config = read_config(GgufFile(tmp_path / "a.gguf"))
    assert config.pop("model_type") == ("llama" if model_type == "mistral" else model_type)
    for field, found in config.items():
        if hasattr(model.config, field):  # Mistral has no biases to ask for
            assert found == getattr(model.config, field) or field == "head_dim", field
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    for name, weight in model.state_dict().items():
        # Gemma's norms lose the last bits of 1 + w, in every file.
        exact = "gemma" not in model_type or "norm" not in name
        torch.testing.assert_close(
            loaded.state_dict()[name], weight, rtol=0, atol=0 if exact else 2e-7
        )
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_bf16_norms_of_gemma_are_exact(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("gemma", **MODELS["gemma"][1]).bfloat16()
    write_model(tmp_path / "a.gguf", model, TensorType.BF16)
    loaded = effllm.load(tmp_path / "a.gguf", progress=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_gemma2_of_46_layers_scales_otherwise(make_model: MakeModel, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    changes = MODELS["gemma2"][1] | small | {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}
    model = make_model("gemma2", **changes)
    write_model(tmp_path / "a.gguf", model, TensorType.F32)
    assert read_config(GgufFile(tmp_path / "a.gguf"))["query_pre_attn_scalar"] == 16
    model.config.query_pre_attn_scalar = 32
    with pytest.raises(GgufError, match="'query_pre_attn_scalar' must be 16"):
        config_metadata(model.config.to_dict())


def test_keys_of_one_architecture_are_refused_in_another(
    make_model: MakeModel, tmp_path: Path
) -> None:
    for key, value in (("attn_logit_softcapping", 50.0), ("attention.sliding_window", 8)):
        write_model(
            tmp_path / "a.gguf", make_model("qwen2"), TensorType.F32, {f"qwen2.{key}": value}
        )
        with pytest.raises(GgufError, match=rf"'qwen2.{key}' is '{value}', which a model of qwen2"):
            read_config(GgufFile(tmp_path / "a.gguf"))


def test_a_config_that_transformers_refuses_is_one_error(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("gemma2", **MODELS["gemma2"][1])
    write_model(tmp_path / "a.gguf", model, TensorType.F32, {"gemma2.embedding_length": 97})
    with pytest.raises(CheckpointError, match=r"a\.gguf: "):
        effllm.load(tmp_path / "a.gguf")


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {}, "only gemma, gemma2, llama, mistral, qwen2, qwen3 can be stored, got 'gpt2'"),
    ("llama", {"hidden_act": "gelu"}, "'hidden_act' must be 'silu' for llama to be stored"),
    ("mistral", {"sliding_window": 8}, "sliding windows cannot be stored for llama"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "sliding windows cannot be stored for qwen2",
    ),
    ("gemma2", {"final_logit_softcapping": None}, "'final_logit_softcapping' must be a number"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "a rope_type of default, linear, llama3, yarn can be stored, got 'dynamic'",
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 2.0,
            }
        },
        "yarn rope scaling with 'attention_factor' 2.0 cannot be stored",
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 8.0,
            }
        },
        "llama3 rope with frequency factors other than 1 and 4",
    ),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), CONFIGS)
def test_configs_that_cannot_be_written(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    config = transformers.AutoConfig.for_model(model_type, **changes).to_dict()
    with pytest.raises(GgufError, match=message):
        config_metadata(config)


def refuse(model: Any, path: Path, message: str, kind: TensorType = TensorType.Q4_0) -> None:
    with pytest.raises(GgufError, match=message):
        write_model(path, model, kind)
    assert not path.exists()


K = "model.layers.1.self_attn.k_proj"


def test_models_that_cannot_be_written(make_llama: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    refuse(make_llama(), path, "Q5_K cannot be written, only F32", TensorType.Q5_K)
    model = make_llama()
    del model.model.norm.weight
    refuse(model, path, r"'model.norm.weight' \[96\] is missing")
    model = make_llama()
    del model.model.norm
    refuse(model, path, r"'model.norm.weight' \[96\] is missing")
    model = make_llama()
    model.model.extra = torch.nn.Linear(2, 2)
    refuse(model, path, "'model.extra.weight' is no weight that a llama model")
    model = make_llama()
    model.set_submodule(K, torch.nn.Linear(32, 96, bias=False))
    refuse(model, path, rf"'{K}.weight' must be \[32, 96\], got \[96, 32\]")
    refuse(make_llama().to("meta"), path, "is on the meta device, it has no values")


def int4(model: Any, group_size: int, symmetric: bool = True, dtype: Any = torch.float16) -> Any:
    for slot in slots(model.config.to_dict()):
        if slot.linear:
            layer = model.get_submodule(slot.module).to(dtype)
            model.set_submodule(slot.module, Int4Linear.from_linear(layer, group_size, symmetric))
    return model


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_int4_layers_are_stored_as_they_are(
    group_size: int, make_llama: MakeModel, tmp_path: Path
) -> None:
    """The last group of 64 in rows of 96 or 160 is short."""
    model = int4(make_llama(), group_size)
    write_model(tmp_path / "a.gguf", model, TensorType.Q4_0)
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            assert isinstance(loaded.get_submodule(name), Int4Linear)
            assert torch.equal(loaded.get_submodule(name).weight, module.weight), name


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_int4_layers_are_rounded_to_other_types(
    kind: str, make_llama: MakeModel, tmp_path: Path
) -> None:
    model = int4(make_llama(), 64, symmetric=False)
    layer = model.get_submodule(K)
    layer.perm = torch.nn.Parameter(torch.randperm(96, dtype=torch.int32), requires_grad=False)
    model.set_submodule(
        "model.layers.0.mlp.up_proj",
        Lut4Linear.from_linear(make_llama().model.layers[0].mlp.up_proj, group_size=64),
    )
    write_model(tmp_path / "a.gguf", model, TensorType[kind])
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear | Lut4Linear):
            found, expected = loaded.get_submodule(name).weight, module.weight.float()
            # `weight` is in the dtype of the scales, fp16.
            step = 2**-10 if kind == "F32" else expected.abs().max() / 127
            torch.testing.assert_close(found, expected, rtol=0, atol=float(step))


def test_int4_layers_that_q4_0_cannot_hold(make_llama: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    refuse(int4(make_llama(), 32, symmetric=False), path, "zero points other than 8; Q8_0 and the")
    refuse(int4(make_llama(), 32, dtype=torch.float32), path, "its scales are no fp16 numbers")
    model = int4(make_llama(), 32)
    layer = model.get_submodule(K)
    layer.perm = torch.nn.Parameter(torch.randperm(96, dtype=torch.int32), requires_grad=False)
    refuse(model, path, f"layer '{K}' cannot be stored as Q4_0 .* its inputs are permuted")
    model = make_llama()
    model.set_submodule(K, Lut4Linear.from_linear(model.get_submodule(K), group_size=32))
    refuse(model, path, "it is a Lut4Linear")


def exact_in_q4_1(model: Any) -> Any:
    """Scales of few bits, so that their products with zero points are fp16 numbers."""
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.scales.data = (module.scales * 4096).ceil().clamp(max=127) / 4096
    return model


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_layers_with_zero_points_are_stored_as_they_are(
    group_size: int, symmetric: bool, make_llama: MakeModel, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra effllm[formats] (gguf)")
    model = exact_in_q4_1(int4(make_llama(), group_size, symmetric=symmetric))
    effllm.save(model, tmp_path / "a.gguf", "gguf-q4_1", progress=False)
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            assert isinstance(loaded.get_submodule(name), Int4Linear)
            assert torch.equal(loaded.get_submodule(name).weight, module.weight), name
    tensor = theirs["blk.1.ffn_down.weight"]
    dense = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    down = model.model.layers[1].mlp.down_proj
    assert torch.equal(dense.half(), down.weight)
    effllm.save(loaded, tmp_path / "b.gguf", "gguf-q4_1", progress=False)
    a, b = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert all(torch.equal(a.raw(name), b.raw(name)) for name in a.tensors if "embd" not in name)


def test_int4_layers_that_q4_1_cannot_hold(make_llama: MakeModel, tmp_path: Path) -> None:
    model = int4(make_llama(), 32, symmetric=False)
    with pytest.raises(GgufError, match=r"layer 'model.layers.0.self_attn.q_proj' .* Q4_1 .*zero"):
        write_model(tmp_path / "a.gguf", model, TensorType.Q4_1)
    assert not (tmp_path / "a.gguf").exists()
    layer = exact_in_q4_1(model).get_submodule(K)
    layer.perm = torch.nn.Parameter(torch.randperm(96, dtype=torch.int32), requires_grad=False)
    with pytest.raises(GgufError, match=f"layer '{K}' .* Q4_1 .* its inputs are permuted"):
        write_model(tmp_path / "a.gguf", model, TensorType.Q4_1)


def test_a_tied_head_of_codes_gets_a_tensor(make_llama: MakeModel, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    head = torch.nn.Linear(96, 101, bias=False)
    model.set_submodule("lm_head", Int4Linear.from_linear(head.half(), 32))
    write_model(tmp_path / "a.gguf", model, TensorType.Q4_0)
    loaded = effllm.load(tmp_path / "a.gguf", progress=False)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not loaded.config.tie_word_embeddings
