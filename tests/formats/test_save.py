"""effllm.save: what is written reads back bit for bit, by us and by the package of the format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors_package import load_what_it_writes
from formats_zoo import Zoo, write_checkpoint
from safetensors.torch import load_file
from tiny_models import IDS
from torch import nn

import effllm
from effllm.formats import Checkpoint, inspect
from effllm.formats.loading import load
from effllm.formats.saving import SaveFormat, save
from effllm.formats.shards import ShardWriter
from effllm.nn import Int4Linear, Lut4Linear, W4A8Linear

FORMATS: list[SaveFormat] = ["compressed-tensors", "gptq_v2", "awq"]


def dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, packed weights decoded."""
    state = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state[f"{name}.weight"] = module.weight
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias
    return state


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    left, right = dense_state(a), dense_state(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert value.dtype == right[name].dtype, name


@pytest.fixture
def quantised(llama: Any) -> Any:
    """bf16, groups of 32 with zero points; the head is not quantised."""
    model = llama.to(torch.bfloat16)
    config = effllm.Int4Config(group_size=32, symmetric=False)
    effllm.quantize_(model, config, lambda module, name: name != "lm_head")
    return model


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(
    format: SaveFormat, group_size: int, symmetric: bool, llama: Any, tmp_path: Path
) -> None:
    if group_size == 64 and format != "gptq_v2":
        pytest.skip("96 input channels are no multiple of 64")
    model = llama.to(torch.bfloat16)
    config = effllm.Int4Config(group_size, symmetric)
    effllm.quantize_(model, config, lambda module, name: name != "lm_head")
    save(model, tmp_path / "c", format, progress=False)
    again = load(tmp_path / "c", progress=False)
    assert_same_model(model, again)
    # The cast to bf16 above has rounded the frequencies too.
    model.model.rotary_emb = again.model.rotary_emb
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            other = again.get_submodule(name)
            assert torch.equal(module.qweight, other.qweight), name
            assert (module.zeros is None) == (other.zeros is None), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_files_say_nothing_of_rounded_inputs(
    format: SaveFormat, dtype: torch.dtype, two_level: bool, llama: Any, tmp_path: Path
) -> None:
    """A ``W4A8Linear`` is written as what it is over, and comes back as an ``Int4Linear``: scales
    of two levels as their products, which are numbers of the model's dtype."""
    model = llama.to(dtype)
    token = effllm.Granularity.token()
    config = effllm.Int4Config(32, symmetric=two_level, inputs=token, two_level=two_level)
    effllm.quantize_(model, config, lambda module, name: name != "lm_head")
    save(model, tmp_path / "c", format, progress=False)
    again = load(tmp_path / "c", progress=False)
    assert_same_model(model, again)
    name = "model.layers.0.mlp.up_proj"
    assert type(model.get_submodule(name)) is W4A8Linear
    assert (model.get_submodule(name).multipliers is not None) == two_level
    assert again.get_submodule(name).scales.dtype == dtype
    assert type(again.get_submodule(name)) is Int4Linear


@pytest.mark.parametrize(
    "kind",
    [
        Zoo("awq", bias=True),
        Zoo("gptq_v2", shuffled=True),
        Zoo("gptq_v2", bits=3, intermediate=90),
        Zoo("gptq", bits=2, shuffled=True, symmetric=True, tied=True),
        Zoo("pack-quantized", tied=True, dtype=torch.bfloat16),
        Zoo("pack-quantized", head=True, tied=True),
        Zoo("gptq_v2", bits=8),
    ],
    ids=lambda kind: kind.id,
)
@pytest.mark.parametrize("format", FORMATS)
def test_from_any_format_to_any(format: SaveFormat, kind: Zoo, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", kind)
    model = load(tmp_path / "a", progress=False)
    refusal = None
    if kind.bits == 8:
        refusal = "has no Int4Linear"
    elif format == "compressed-tensors" and kind.shuffled:
        refusal = r"layer 'model\.layers\.0\.self_attn\.q_proj': .* reordered \(act-order\)"
    elif format == "awq" and kind.shuffled:
        refusal = "AWQ holds 4-bit codes with the input channels in order"
    elif format != "gptq_v2" and kind.intermediate == 90:
        refusal = "got .*N = 90|got K = 90"
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            save(model, tmp_path / "b", format, progress=False)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
        return
    save(model, tmp_path / "b", format, progress=False)
    again = load(tmp_path / "b", progress=False)
    assert_same_model(model, again)
    tied = kind.tied and not kind.head
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in Checkpoint(tmp_path / "b").tensors) == (
        not kind.tied and not kind.head
    )


def test_layers_of_different_kinds(llama: Any, tmp_path: Path) -> None:
    def some(part: str) -> Any:
        return lambda module, name: part in name

    effllm.quantize_(llama, effllm.Int4Config(32), some("mlp.up"))
    effllm.quantize_(llama, effllm.Int4Config(32, symmetric=False), some("mlp.gate"))
    effllm.quantize_(llama, effllm.Int4Config(-1, symmetric=False), some("q_proj"))
    for format in FORMATS[:2]:
        save(llama, tmp_path / format, format, progress=False)
        assert_same_model(llama, load(tmp_path / format, progress=False))
    with pytest.raises(ValueError, match=r"AWQ needs one group size, the model has -1 \(.*, 32 \("):
        save(llama, tmp_path / "awq", "awq")


def test_shards(quantised: Any, tmp_path: Path) -> None:
    save(quantised, tmp_path / "one", progress=False)
    save(quantised, tmp_path / "many", max_shard_bytes=20_000, progress=False)
    names = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    beside = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert {p.name for p in (tmp_path / "many").iterdir()} == beside | set(names)
    parts = [load_file(tmp_path / "many" / name) for name in names]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert sum(map(len, parts)) == len(whole)
    assert all(torch.equal(whole[name], t) for part in parts for name, t in part.items())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert_same_model(quantised, load(tmp_path / "many", progress=False))
    assert inspect(tmp_path / "one") == inspect(tmp_path / "one")
    assert inspect(tmp_path / "one").bytes == inspect(tmp_path / "many").bytes


def test_files_are_those_of_the_package(tmp_path: Path) -> None:
    """Whatever comes after what, each tensor is aligned, and nothing lies between them."""
    parts = [
        {"a": torch.rand(3).half(), "b": torch.arange(5).byte()},
        {"c": torch.arange(3), "d": torch.tensor(True), "e": torch.rand(7, 1).T},
        {"f": torch.empty(0, 2), "g": torch.arange(6.0).view(2, 3).T, "h": torch.tensor(3).int()},
    ]
    writer = ShardWriter(tmp_path, 1000)
    for part in parts:
        writer.add(part)
    writer.finish()
    (path,) = tmp_path.iterdir()
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % expected[name].element_size() == 0


def test_nothing_is_left_half_written(
    quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ShardWriter.finish, []

    def interrupted(writer: ShardWriter) -> None:
        original(writer)
        calls.append(len(list(writer._folder.glob("*.safetensors"))))
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(quantised, tmp_path / "c", max_shard_bytes=20_000, progress=False)
    assert calls[0] > 2
    assert list(tmp_path.iterdir()) == []


def test_errors(quantised: Any, llama: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="full exists and is no empty folder"):
        save(quantised, tmp_path / "full")
    with pytest.raises(FileExistsError):
        save(quantised, tmp_path / "full" / "x")
    (tmp_path / "empty").mkdir()
    save(quantised, tmp_path / "empty", progress=False)
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "full").stat().st_mode
    with pytest.raises(ValueError, match=r"format must be one of .*, bitsandbytes, gguf-q4_0, .*"):
        save(quantised, tmp_path / "x", "gguf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a transformers model is needed, got Linear"):
        save(nn.Linear(2, 2), tmp_path / "x")
    layer = quantised.model.layers[0].mlp.up_proj
    quantised.model.layers[0].mlp.up_proj = Lut4Linear(64, 96, bias=False)
    with pytest.raises(ValueError, match=r"up_proj': compressed-tensors holds no Lut4Linear, onl"):
        save(quantised, tmp_path / "x")
    quantised.model.layers[0].mlp.up_proj = layer
    layer.zeros[3, 1] = 16
    with pytest.raises(ValueError, match=r"up_proj': codes must fit in 4 bits, got 16"):
        save(quantised, tmp_path / "x", progress=False)
    with pytest.raises(ValueError, match="is on the meta device"):
        save(quantised.to("meta"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"]


# -- the package of the format ---------------------------------------------------------------------


# The config that asks for dense weights is merged with that of the file, which it warns of.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_reads_what_we_write(
    symmetric: bool, group_size: int, llama: Any, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra effllm[formats]")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = llama.to(torch.bfloat16)
    config = effllm.Int4Config(group_size, symmetric)
    effllm.quantize_(model, config, lambda module, name: name != "lm_head")
    save(model, tmp_path / "c", progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "c",
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    assert_same_model(model, theirs)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_we_read_what_compressed_tensors_writes(
    symmetric: bool, strategy: str, bits: int, llama: Any, tmp_path: Path
) -> None:
    """Quantised, compressed and saved by the package, then its own dense weights."""
    if strategy == "tensor" and not symmetric:
        pytest.skip("the package stores no zero points of such weights")
    ours = load_what_it_writes(
        llama,
        tmp_path,
        "pack-quantized",
        (0.02, 0.04),
        num_bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=32 if strategy == "group" else None,
    )
    kinds = {Int4Linear} if bits <= 4 else {nn.Linear}
    assert {type(layer.mlp.up_proj) for layer in ours.model.layers} == kinds
