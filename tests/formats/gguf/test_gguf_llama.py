"""Llamas through GGUF files: weights, logits and configs, also as the gguf package and transformers
see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import logits

import effllm
from effllm.formats.gguf import (
    GgufError,
    GgufFile,
    TensorSource,
    TensorType,
    config_metadata,
    dequantize,
    int4_layers,
    quantize,
    read_config,
    read_state_dict,
    write_gguf,
    write_model,
)
from effllm.formats.gguf.architecture import slots, to_gguf_rows, to_hf_rows
from effllm.formats.gguf.layout import BLOCK_TYPES
from effllm.formats.gguf.rope import rope_freqs
from effllm.nn import GgufLinear, Int4Linear

NEEDS_GGUF = "needs the extra effllm[formats] (gguf)"
MakeLlama = Callable[..., Any]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "no groups": {"num_key_value_heads": 6},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
}


def save(model: Any, path: Path, kind: TensorType = TensorType.F32, **metadata: Any) -> GgufFile:
    write_model(path, model, kind, metadata)
    return GgufFile(path)


def load(make: MakeLlama, file: GgufFile, **options: Any) -> Any:
    """As a loader would: the model of the file's config, its packed layers, then the entries."""
    config = read_config(file)
    assert config.pop("model_type") == "llama"
    model = make(**config)
    if options.get("int4", True):
        for name, symmetric in int4_layers(file).items():
            old = model.get_submodule(name)
            new = Int4Linear(
                old.in_features,
                old.out_features,
                bias=old.bias is not None,
                group_size=32,
                symmetric=symmetric,
                dtype=torch.float16,
            )
            model.set_submodule(name, new)
        for slot in slots(config | {"model_type": "llama"}):
            kind = file.tensors[slot.gguf].type
            if slot.linear and kind in BLOCK_TYPES:
                old = model.get_submodule(slot.module)
                sizes = (old.in_features, old.out_features, old.bias is not None)
                new = GgufLinear(*sizes, tensor_type=BLOCK_TYPES[kind])
                model.set_submodule(slot.module, new)
    entries = dict(read_state_dict(file, **options))
    # Assigned, or the biases of int4 layers would take the dtype of the scales.
    missing, unexpected = model.load_state_dict(entries, strict=False, assign=True)
    model.tie_weights()
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back_the_same(variant: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama(**VARIANTS[variant])
    file = save(model, tmp_path / "a.gguf")
    config = read_config(file)
    for field, found in config.items():
        assert found == getattr(model.config, field), field
    loaded = load(make_llama, file)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q8_0"])
def test_other_types_give_their_own_rounding(
    kind: str, make_llama: MakeLlama, tmp_path: Path
) -> None:
    model = make_llama(attention_bias=True)
    file = save(model, tmp_path / "a.gguf", TensorType[kind])
    expected = make_llama(attention_bias=True)
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.dim() == 2:
                raw = quantize(parameter, TensorType[kind])
                parameter.copy_(dequantize(raw, TensorType[kind], tuple(parameter.shape)))
    dense = load(make_llama, file, int4=False, dtype=torch.float32)
    # Rows move as a whole, so that they are rounded alike in either order.
    for name, weight in expected.state_dict().items():
        assert torch.equal(dense.state_dict()[name], weight), name
    stored = dict(read_state_dict(file, int4=False))
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert stored["lm_head.weight"].dtype == dtypes.get(kind, torch.float32)
    assert stored["model.norm.weight"].dtype == torch.float32


def test_q4_0_layers_become_int4_and_go_back_without_loss(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    model = make_llama(mlp_bias=True)
    file = save(model, tmp_path / "a.gguf", TensorType.Q4_0)
    layers = int4_layers(file)
    assert len(layers) == 2 * 7 + 1
    assert all(layers.values())
    assert "model.embed_tokens" not in layers
    int4 = load(make_llama, file)
    dense = load(make_llama, file, int4=False)
    for name in layers:
        weight = int4.get_submodule(name).weight.float()
        torch.testing.assert_close(weight, dense.get_submodule(name).weight, rtol=2**-10, atol=0)
    torch.testing.assert_close(logits(int4), logits(dense), rtol=1e-4, atol=1e-4)
    again = save(int4, tmp_path / "b.gguf", TensorType.Q4_0)
    for name in layers:
        slot = next(s for s in slots(read_config(file)) if s.module == name)
        assert torch.equal(again.raw(slot.gguf), file.raw(slot.gguf)), name


def test_exact_q4_1_layers_become_int4_with_zeros(make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama()
    name, shape = "blk.1.attn_k.weight", (32, 96)
    file = save(model, tmp_path / "a.gguf", TensorType.Q8_0)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (96, 20), dtype=np.uint8)
    d = (rng.integers(1, 64, (96, 1)) / 1024).astype(np.float16)
    exact = np.hstack([d, d * -rng.integers(4, 12, (96, 1)).astype(np.float16)])
    for scales, expected in ((exact, True), (exact + np.float16([0, 1e-3]), False)):
        blocks[:, :4] = scales.astype(np.float16).view(np.uint8)
        q4_1 = torch.from_numpy(blocks.copy()).flatten()
        sources = [
            TensorSource(name, shape, TensorType.Q4_1, lambda data=q4_1: data)
            if info.name == name
            else TensorSource(info.name, info.shape, info.type, lambda n=info.name: file.raw(n))
            for info in file.tensors.values()
        ]
        write_gguf(tmp_path / "b.gguf", file.metadata, sources)
        changed = GgufFile(tmp_path / "b.gguf")
        module = "model.layers.1.self_attn.k_proj"
        assert int4_layers(changed) == ({module: False} if expected else {})
        loaded = load(make_llama, changed).get_submodule(module)
        assert isinstance(loaded, Int4Linear) == expected
        values = to_hf_rows(dequantize(q4_1, TensorType.Q4_1, shape), 2)
        rtol = 2**-10 if expected else 0  # Int4Linear gives its weight in the dtype of its scales
        torch.testing.assert_close(loaded.weight.float(), values, rtol=rtol, atol=0)
        ours = effllm.load(tmp_path / "b.gguf", dtype=torch.float32, progress=False)
        assert isinstance(ours.get_submodule(module), Int4Linear) == expected
        assert torch.equal(ours.get_submodule(module).weight, loaded.weight)


@pytest.mark.parametrize(("heads", "head_dim"), [(32, 4), (4, 32), (6, 16), (1, 8), (5, 2)])
def test_rows_move_within_their_head(heads: int, head_dim: int) -> None:
    rows = torch.arange(heads * head_dim).unsqueeze(1).expand(-1, 3).contiguous()
    gguf = to_gguf_rows(rows, heads)
    for head in range(heads):
        for plane in range(head_dim // 2):
            for half in range(2):
                found = gguf[head * head_dim + 2 * plane + half, 0]
                assert found == head * head_dim + half * (head_dim // 2) + plane
    assert torch.equal(to_hf_rows(gguf, heads), rows)
    assert torch.equal(to_gguf_rows(to_hf_rows(rows, heads), heads), rows)


def test_neighbours_turn_in_gguf_as_halves_do_in_hugging_face() -> None:
    """Scores of rotated queries and keys are the same: the reason for the permutation."""
    queries, keys = torch.randn(2, 3 * 16, dtype=torch.float64).unbind()  # 3 heads
    angle = 0.7 * 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)

    def rotate(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        x, out = x.view(3, 16), torch.empty(3, 16, dtype=torch.float64)
        out[:, first] = x[:, first] * angle.cos() - x[:, second] * angle.sin()
        out[:, second] = x[:, second] * angle.cos() + x[:, first] * angle.sin()
        return out

    planes = torch.arange(8)
    halves = rotate(queries, planes, planes + 8) * keys.view(3, 16)
    neighbours = rotate(to_gguf_rows(queries, 3), 2 * planes, 2 * planes + 1)
    neighbours = neighbours * to_gguf_rows(keys, 3).view(3, 16)
    torch.testing.assert_close(neighbours.sum(1), halves.sum(1))


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_our_file(
    kind: str, tied: bool, make_llama: MakeLlama, tmp_path: Path
) -> None:
    pytest.importorskip("gguf.gguf_reader", reason=NEEDS_GGUF)
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    file = save(make_llama(tie_word_embeddings=tied), tmp_path / "a.gguf", TensorType[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32
    )
    ours = load(make_llama, file, int4=False)
    assert theirs.config.rms_norm_eps == pytest.approx(1e-5)
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    torch.testing.assert_close(logits(theirs), logits(ours))


def test_a_file_of_the_gguf_package(make_llama: MakeLlama, tmp_path: Path) -> None:
    """Written through its writer and its names, with rows in the order of a plain loop."""
    gguf = pytest.importorskip("gguf.gguf_writer", reason=NEEDS_GGUF)
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map, quants

    model = make_llama(num_hidden_layers=2)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(160)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_rope_dimension_count(16)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        data = weight.numpy()
        heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            order = [
                h * 16 + half * 8 + j for h in range(heads) for j in range(8) for half in (0, 1)
            ]
            data = data[order]
        kind = GGMLQuantizationType.Q8_0 if data.ndim == 2 else GGMLQuantizationType.F32
        stored = quants.quantize(data, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GgufFile(tmp_path / "a.gguf")
    config = read_config(file)
    for field, found in config.items():
        assert found == getattr(model.config, field), field
    ours = save(model, tmp_path / "b.gguf", TensorType.Q8_0)
    assert ours.tensors.keys() == file.tensors.keys()
    for name in file.tensors:
        assert torch.equal(ours.raw(name), file.raw(name)), name
    assert torch.equal(logits(load(make_llama, file)), logits(load(make_llama, ours)))


def test_llama3_frequencies_are_those_of_transformers(make_llama: MakeLlama) -> None:
    model = make_llama(rope_parameters=LLAMA3)
    freqs = rope_freqs(LLAMA3, 16)
    assert freqs is not None
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / freqs, model.model.rotary_emb.inv_freq)
    assert 1 < len(set(freqs.tolist())) < 8  # all three ranges


def test_extra_metadata_wins(make_llama: MakeLlama, tmp_path: Path) -> None:
    extra = {"general.name": "tiny", "tokenizer.ggml.eos_token_id": 7}
    file = save(make_llama(eos_token_id=[2, 3]), tmp_path / "a.gguf", TensorType.Q4_0, **extra)
    assert file.metadata["general.name"] == "tiny"
    assert (file.metadata["general.file_type"], read_config(file)["eos_token_id"]) == (2, 7)
    assert (
        config_metadata(make_llama(eos_token_id=[2, 3]).config.to_dict())[
            "tokenizer.ggml.eos_token_id"
        ]
        == 2
    )


def edited(file: GgufFile, path: Path, **changes: Any) -> GgufFile:
    """The file with other metadata (None: without) or tensors (None, or another source)."""
    metadata = {**file.metadata, **{k: v for k, v in changes.items() if "weight" not in k}}
    sources = {
        info.name: TensorSource(info.name, info.shape, info.type, lambda n=info.name: file.raw(n))
        for info in file.tensors.values()
    } | {k: v for k, v in changes.items() if "weight" in k}
    write_gguf(
        path,
        {key: value for key, value in metadata.items() if value is not None},
        [source for source in sources.values() if source is not None],
    )
    return GgufFile(path)


def zeros(name: str, *shape: int, kind: TensorType = TensorType.F32) -> dict[str, TensorSource]:
    size = int(np.prod(shape)) // kind.block_values * kind.block_bytes
    data = torch.zeros(size, dtype=torch.uint8)
    return {name: TensorSource(name, shape, kind, lambda: data)}


Q, K = "blk.0.attn_q.weight", "blk.1.attn_k.weight"
WRONG_FILES: list[tuple[dict[str, Any], str]] = [
    (
        {"general.architecture": "bert"},
        "'general.architecture' must be one of llama, .*, got 'bert'",
    ),
    ({"general.architecture": None}, "must be one of llama, .*, got 'None'"),
    ({"split.count": 3}, "one of 3 parts of a model"),
    (
        {"llama.expert_count": 8},
        "'llama.expert_count' is '8', which a model of llama does not have",
    ),
    ({"llama.attention.sliding_window": 4096}, "sliding_window' is '4096'"),
    ({"llama.block_count": None}, "'llama.block_count' is missing"),
    ({"llama.block_count": 2**31}, "'llama.block_count' must be a positive integer"),
    ({"llama.block_count": 1000}, "1000 layers, but only 21 tensors"),
    ({"llama.block_count": 3}, r"tensor 'blk.2.attn_q.weight' \[96, 96\] is missing"),
    ({"llama.block_count": 1}, r"tensor 'blk.1.\w+.weight' is no part of a llama model"),
    ({"llama.attention.head_count": 0}, "must be a positive integer, got '0'"),
    ({"llama.attention.head_count": [6, 6]}, "head_count' must be a positive integer, got"),
    ({"llama.attention.head_count_kv": 4}, "6 heads cannot share 4 key-value heads"),
    ({"llama.attention.head_count_kv": 3}, r"attn_k.weight' must be \[48, 96\], got \[32, 96\]"),
    ({"llama.rope.dimension_count": 8}, "16 for keys, 16 for values, 8 rotated"),
    ({"llama.attention.value_length": 32}, "16 for keys, 32 for values"),
    ({"llama.vocab_size": 100}, "'llama.vocab_size' is not the 101 rows of 'token_embd.weight'"),
    ({"llama.rope.freq_base": float("nan")}, "must be a positive float, got 'nan'"),
    ({"llama.attention.layer_norm_rms_epsilon": 1}, "must be a positive float, got '1'"),
    ({"llama.rope.scaling.type": "yarn"}, "'llama.rope.scaling.factor' is missing"),
    ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
    ({"llama.rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast' is '16.0', which a model"),
    ({"llama.rope.scaling.type": 1}, "'llama.rope.scaling.type' must be a string"),
    ({"tokenizer.ggml.eos_token_id": 101}, "an integer below 101, got '101'"),
    ({"tokenizer.ggml.tokens": ["a"] * 100}, "'tokenizer.ggml.tokens' has 100 tokens, .* 101 rows"),
    (
        {"tokenizer.ggml.bos_token_id": "x"},
        "'tokenizer.ggml.bos_token_id' must be an integer below 101, got 'x'",
    ),
    ({"token_embd.weight": None}, "there is no matrix 'token_embd.weight'"),
    ({K: None}, r"tensor 'blk.1.attn_k.weight' \[32, 96\] is missing"),
    (zeros(K, 96, 32), r"tensor 'blk.1.attn_k.weight' must be \[32, 96\], got \[96, 32\]"),
    (
        zeros("blk.0.ffn_gate_inp.weight", 2),
        "'blk.0.ffn_gate_inp.weight' is no part of a llama model",
    ),
    (zeros(Q, 96, 96, kind=TensorType.IQ4_NL), "'blk.0.attn_q.weight' is IQ4_NL, only F32"),
    (zeros("rope_freqs.weight", 9), r"'rope_freqs.weight' must be \[8\], got \[9\]"),
    (zeros("rope_freqs.weight", 8), "'rope_freqs.weight' must be finite and at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_FILES, ids=[m for _, m in WRONG_FILES])
def test_files_that_are_no_such_llama(
    changes: dict[str, Any], message: str, make_llama: MakeLlama, tmp_path: Path
) -> None:
    file = edited(save(make_llama(), tmp_path / "a.gguf"), tmp_path / "b.gguf", **changes)
    with pytest.raises(GgufError, match=message) as error:
        next(read_state_dict(file))
    assert str(error.value).startswith(f"{tmp_path / 'b.gguf'}: ")


def test_frequencies_that_are_not_of_llama3(make_llama: MakeLlama, tmp_path: Path) -> None:
    file = save(make_llama(rope_parameters=LLAMA3), tmp_path / "a.gguf")
    freqs = dequantize(file.raw("rope_freqs.weight"), TensorType.F32, (8,))
    freqs[3] *= 1.5
    source = TensorSource.of("rope_freqs.weight", freqs, TensorType.F32)
    changed = edited(file, tmp_path / "b.gguf", **{"rope_freqs.weight": source})
    with pytest.raises(GgufError, match=r"'rope_freqs.weight' is not the rope scaling of Llama 3"):
        read_config(changed)
