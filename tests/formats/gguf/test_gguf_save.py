"""effllm.save and `python -m effllm convert` into GGUF files, and from them into folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import effllm
import effllm.demo
from effllm.cli import main
from effllm.formats import inspect
from effllm.formats.gguf import GgufFile, TensorType, quantize, read_tokenizer, write_model
from effllm.formats.gguf.architecture import slots
from effllm.nn import Int4Linear

MakeModel = Callable[..., Any]
IDS = torch.arange(24).view(2, 12) * 7 % 101
PROMPT = "def read_lines(path):\n    return [line for line in open(path)]\n"


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def equal(a: Any, b: Any) -> bool:
    """Of two models, all parameters."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0", "q4_k", "q6_k", "f16", "bf16", "f32"])
def test_what_is_saved_loads_equal_again(name: str, make_llama: MakeModel, tmp_path: Path) -> None:
    format: Any = f"gguf-{name}"
    effllm.save(make_llama(), tmp_path / "new" / "a.gguf", format, progress=False)
    assert os.listdir(tmp_path / "new") == ["a.gguf"]
    first = effllm.load(tmp_path / "new" / "a.gguf", dtype=torch.float32, progress=False)
    effllm.save(first, tmp_path / "b.gguf", format, progress=False)
    assert equal(first, effllm.load(tmp_path / "b.gguf", dtype=torch.float32, progress=False))
    a, b = GgufFile(tmp_path / "new" / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert a.metadata == b.metadata
    assert all(torch.equal(a.raw(tensor), b.raw(tensor)) for tensor in a.tensors)


def test_the_gguf_package_reads_equal_weights(make_llama: MakeModel, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra effllm[formats] (gguf)")
    model = make_llama()
    for slot in slots(model.config.to_dict()):
        if slot.linear:
            layer = Int4Linear.from_linear(model.get_submodule(slot.module).half(), 64)
            model.set_submodule(slot.module, layer)
    effllm.save(model, tmp_path / "a.gguf", "gguf-q4_0", progress=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for slot in slots(model.config.to_dict()):
        tensor = tensors.pop(slot.gguf)
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        expected = model.get_submodule(slot.module).weight.float()
        if slot.heads:
            expected = expected.view(slot.heads, 2, 8, 96).transpose(1, 2).reshape(slot.shape)
        if slot.linear:
            # `weight` is rounded to fp16, as the scales are.
            assert torch.equal(found.half().float(), expected), slot.gguf
    assert not tensors


def test_paths_and_tokenizers_that_do_not_fit(make_llama: MakeModel, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    model = make_llama()
    with pytest.raises(ValueError, match=r"a GGUF file must be named \*.gguf, got .*out"):
        effllm.save(model, tmp_path / "out", "gguf-q8_0")
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match=r"a.gguf exists"):
        effllm.save(model, tmp_path / "a.gguf", "gguf-q8_0")
    tokenizer = transformers.AutoTokenizer.from_pretrained(effllm.demo.model_path())
    with pytest.raises(ValueError, match="token 4095 of the tokenizer is beyond the vocabulary"):
        effllm.save(model, tmp_path / "b.gguf", "gguf-q8_0", tokenizer=tokenizer)
    assert (tmp_path / "a.gguf").read_text() == "mine"
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_all_end_tokens_are_kept(make_llama: MakeModel, tmp_path: Path) -> None:
    """Those of a turn and a message, which instruction models have, are the model's too."""
    for ends, keys in (([2, 5, 7], {"eos": 2, "eot": 5, "eom": 7}), ([2, 9], {"eos": 2, "eot": 9})):
        model = make_llama()
        model.generation_config.eos_token_id = ends
        path = tmp_path / f"{len(ends)}.gguf"
        effllm.save(model, path, "gguf-q8_0", progress=False)
        metadata = GgufFile(path).metadata
        found = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in keys}
        assert found == keys
        loaded = effllm.load(path, progress=False)
        assert loaded.generation_config.eos_token_id == ends
        assert loaded.config.eos_token_id == 2


def test_a_folder_gets_the_tokenizer(make_llama: MakeModel, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(effllm.demo.model_path())
    model = make_llama()
    effllm.quantize_(model, effllm.Int4Config(32))
    effllm.save(model, tmp_path / "a", tokenizer=tokenizer, progress=False)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]


def test_the_demo_model_there_and_back(tmp_path: Path) -> None:
    """A folder into a GGUF file, that into another and into a folder, with the tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    source = effllm.demo.model_path()
    assert convert(source, tmp_path / "a.gguf", "--format", "gguf-q8_0") == 0
    assert convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "--format", "gguf-q8_0") == 0
    a, b = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert b.tensors == a.tensors
    assert all(torch.equal(a.raw(name), b.raw(name)) for name in a.tensors)
    assert convert(tmp_path / "b.gguf", tmp_path / "c") == 0
    expected = transformers.AutoTokenizer.from_pretrained(source)
    for tokenizer in (
        read_tokenizer(b),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "c"),
    ):
        assert tokenizer(PROMPT)["input_ids"] == expected(PROMPT)["input_ids"]
        assert tokenizer.eos_token_id == expected.eos_token_id
    ids = expected(PROMPT, return_tensors="pt")["input_ids"]
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    with torch.no_grad():
        difference = (loaded(ids).logits - dense(ids).logits).abs().max()
        assert 0 < difference < 0.2
    assert inspect(tmp_path / "c").layers[0].format == "pack-quantized"


def test_int4_layers_convert_without_loss(make_llama: MakeModel, tmp_path: Path) -> None:
    write_model(tmp_path / "a.gguf", make_llama(), TensorType.Q4_0)
    assert convert(tmp_path / "a.gguf", tmp_path / "b") == 0
    assert convert(tmp_path / "b", tmp_path / "c.gguf", "--format", "gguf-q4_0") == 0
    a, c = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "c.gguf")
    for name in a.tensors:
        if "norm" not in name and name != "token_embd.weight":  # those were bf16 on the way
            assert torch.equal(a.raw(name), c.raw(name)), name


def test_what_cannot_be_converted_is_one_line(
    make_llama: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_llama()
    effllm.quantize_(model, effllm.Int4Config(32, symmetric=False))
    effllm.save(model, tmp_path / "a", progress=False)
    assert convert(tmp_path / "a", tmp_path / "b.gguf", "--format", "gguf-q4_0") == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "convert" in line)
    assert "cannot be stored as Q4_0 without loss, because it has zero points" in line
    assert convert(tmp_path / "a", tmp_path / "b.gguf", "--format", "gguf-q8_0") == 0
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "jais"}
    tokens |= {"tokenizer.ggml.tokens": [str(i) for i in range(101)]}
    write_model(tmp_path / "c.gguf", make_llama(), TensorType.Q4_0, tokens)
    assert convert(tmp_path / "c.gguf", tmp_path / "d") == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "convert" in line)
    assert "'tokenizer.ggml.pre' is 'jais'" in line
    assert not (tmp_path / "d").exists()
    assert convert(tmp_path / "c.gguf", tmp_path / "d", "--no-tokenizer") == 0


def test_rounds_as_the_format_does(make_llama: MakeModel, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b.gguf", "--format", "gguf-q4_0") == 0
    weight = make_llama().model.layers[1].mlp.down_proj.weight
    found = GgufFile(tmp_path / "b.gguf").raw("blk.1.ffn_down.weight")
    assert torch.equal(found, quantize(weight, TensorType.Q4_0))
