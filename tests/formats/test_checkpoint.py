"""Files that are damaged or lie: an error that names file, tensor, found and needed, no other."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_zoo import Written, Zoo, edit_config, write_checkpoint, write_tensors
from safetensors.torch import save_file

import effllm
from effllm.formats import Checkpoint, CheckpointError, inspect
from effllm.formats.checkpoint import TORCH_DTYPES

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_checkpoint(tmp_path, Zoo("gptq_v2", shuffled=True))


def write_raw(path: Path, header: str, data: bytes = b"\0" * 16) -> None:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header too small"),
        (b"\xff" * 16, "header too large"),
        (struct.pack("<Q", 100) + b"{}", "header"),
        ("{" + ENTRY + "," + ENTRY.replace("F32", "I32") + "}", "key 'a' is there twice"),
        ("{" + ENTRY.replace("[4]", "[-4]") + "}", "expected usize"),
        ("{" + ENTRY.replace("[4]", "[5]") + "}", "header"),
        ("{" + ENTRY.replace("[4]", "[4611686018427387904,4]") + "}", "overflow"),
        ("{" + ENTRY.replace("[0,16]", "[16,32]") + "}", "header"),
        ("{" + ENTRY + "," + ENTRY.replace('"a"', '"b"') + "}", "invalid offset"),
        ("[" * 100000, "invalid JSON in header"),
        ("{" + ENTRY.replace("F32", "Q9") + "}", "unknown variant"),
    ],
)
def test_damaged_headers(content: bytes | str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if isinstance(content, str):
        write_raw(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(tmp_path)
    assert str(path) in str(error.value)


def test_truncated_files(written: Written) -> None:
    path = written.folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            Checkpoint(written.folder)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/tmp/evil.safetensors",
        "../evil.safetensors",
        "sub/../../evil.safetensors",
        "sub/evil.safetensors",
        "..\\evil.safetensors",
        "C:evil.safetensors",
        "evil.safetensors\0",
        "model.bin",
        "",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_an_index_stays_in_its_folder(name: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "evil.safetensors")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"'a' must be in a \.safetensors file of this"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ("9" * 10000, "not valid JSON|must be a JSON object"),
        ("\ud800", "not valid JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "weight_map must map tensors to files, got nothing"),
        ('{"weight_map": []}', "weight_map must map tensors to files"),
        ('{"weight_map": "x"}', "weight_map must map tensors to files, got str"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' is there twice"),
        ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors: the file is missing"),
    ],
)
def test_damaged_indices(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_shards_and_index_agree(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"several files need .* found x\.s.*, y\.safetensor"):
        Checkpoint(tmp_path)

    def write(**weight_map: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    write(a="x.safetensors", b="y.safetensors")
    assert set(Checkpoint(tmp_path).tensors) == {"a", "b"}
    write(a="x.safetensors", b="x.safetensors")
    with pytest.raises(CheckpointError, match=r"'b' must be in x.safetensors, found no such tenso"):
        Checkpoint(tmp_path)
    write(a="y.safetensors", b="x.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' must be in y.safetensors, found it in x"):
        Checkpoint(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "y.safetensors")
    write(a="x.safetensors", b="y.safetensors")
    with pytest.raises(CheckpointError, match=r"y.safetensors: tensor 'a' is also in .*x.safeten"):
        Checkpoint(tmp_path)


def test_which_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        Checkpoint(tmp_path / "none")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        Checkpoint(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "gptq-4bit.safetensors")
    assert set(Checkpoint(tmp_path).tensors) == {"a"}
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path).tensors) == {"b"}
    # Download caches consist of links.
    os.rename(tmp_path / "model.safetensors", tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path).tensors) == {"b"}


def test_tensors_do_not_follow_the_file(tmp_path: Path) -> None:
    """They are read, not mapped: a checkpoint may be overwritten while its model is in use."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10_000)}, path)
    checkpoint = Checkpoint(tmp_path)
    tensor = checkpoint.read("a")
    with path.open("r+b") as file:
        file.seek(-40_000, os.SEEK_END)
        file.write(b"\1" * 40_000)
    assert not tensor.any()
    # What is read now might not be what the header was checked for.
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file has changed since"):
        checkpoint.read("a")


def test_files_that_go_while_they_are_read(tmp_path: Path) -> None:
    """A mapped file that is shortened ends the process."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10_000)}, path)
    checkpoint = Checkpoint(tmp_path)
    status = path.stat()
    os.truncate(path, 20_000)
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        checkpoint.read("a")
    save_file({"a": torch.zeros(10_000)}, path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint._opened[path] = (*checkpoint._opened[path][:2], 20_000, status.st_mtime_ns)
    os.truncate(path, 20_000)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"tensor 'a' needs 40000 bytes, got 199\d\d"):
        checkpoint.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'a': .*No such file"):
        checkpoint.read("a")


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in TORCH_DTYPES.values()}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert bytes(found.flatten().view(torch.uint8)) == bytes(tensor.flatten().view(torch.uint8))
    save_file({"a": torch.zeros(4, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a' has dtype C64"):
        Checkpoint(tmp_path).read("a")


def test_tensors_that_somebody_else_has_read(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([0.1]), "b": torch.tensor([2])}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    view = checkpoint.with_tensors({"a": torch.tensor([7.0]), "b": torch.tensor([7.0])})
    assert view.read("a").tolist() == [7]
    assert view.read("b").tolist() == [2]  # a cast of what is stored, or something else
    assert checkpoint.read("a").tolist() != [7]


# -- tensors against the config and the model ------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{UP}.scales"), rf"tensor '{UP}\.scales' is missing"),
        (without(f"{UP}.qzeros"), rf"tensor '{UP}\.qzeros' is missing"),
        (without(f"{UP}.qweight"), rf"tensor '{UP}\.weight' is missing"),
        (without("model.norm.weight"), r"tensor 'model\.norm\.weight' is missing"),
        (
            replaced(f"{UP}.scales", lambda t: t[:1]),
            rf"'{UP}\.scales' must be F16 or BF16 or F32 \[2, 96\], got F16 \[1, 96\]",
        ),
        (
            replaced(f"{UP}.scales", lambda t: t.int()),
            rf"'{UP}\.scales' must be F16 or BF16 or F32 \[2, 96\], got I32 \[2, 96\]",
        ),
        (
            replaced(f"{UP}.qzeros", lambda t: t.T),
            rf"'{UP}\.qzeros' must be I32 \[2, 12\], got I32 \[12, 2\]",
        ),
        (
            replaced(f"{UP}.qweight", lambda t: t[:, :88]),
            rf"'{UP}\.qweight' must be a weight \[N, K\] = \[96, 64\], got one of \[88, 64\]",
        ),
        (
            replaced(f"{UP}.qweight", lambda t: t.long()),
            rf"'{UP}\.qweight' must be a non-empty I32 matrix, got I64",
        ),
        (
            replaced(f"{UP}.qweight", lambda t: t[:7]),
            rf"'{UP}\.qweight' must be I32 \[8, 96\], got I32 \[7, 96\]",
        ),
        (
            replaced(f"{UP}.g_idx", lambda t: t + 1),
            rf"layer '{UP}': g_idx must be in -2\.\.1, got 1\.\.2",
        ),
        (
            replaced(f"{UP}.scales", lambda t: t * float("nan")),
            rf"'{UP}\.scales' must be finite, got NaN or infinity",
        ),
        (
            replaced("model.norm.weight", lambda t: t[1:]),
            r"'model\.norm\.weight' must be F16 or BF16 or F32 \[64\], got F16 \[63\]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.act.scales": torch.ones(96)}),
            r"tensor 'model\.layers\.0\.mlp\.act\.scales' and 0 others belong to no layer of Llama",
        ),
        (
            lambda tensors: tensors.update({"model.norm.qweight": torch.ones(8, 8).int()}),
            r"'model\.norm' is stored as a quantised linear layer, .* has LlamaRMSNorm",
        ),
        (
            lambda tensors: tensors.update({"nowhere.qweight": torch.ones(8, 8).int()}),
            r"'nowhere' is stored as a quantised linear layer, and the model has no such layer",
        ),
        (
            lambda tensors: tensors.update({f"{UP}.weight_packed": torch.ones(8, 8).int()}),
            rf"'{UP}\.weight_packed' is quantised, which disagrees with .*config\.json",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Any]], None], message: str, written: Written
) -> None:
    tensors = dict(written.tensors)
    change(tensors)
    write_tensors(written.folder, {name: t.contiguous() for name, t in tensors.items()})
    with pytest.raises(CheckpointError, match=message) as error:
        effllm.load(written.folder, progress=False)
    assert str(written.folder) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("awq", {"bits": 8}, "bits = 8 is not supported; effllm reads AWQ"),
        ("awq", {"version": "gemv"}, "AWQ version 'gemv' is not supported"),
        ("awq", {"group_size": 0}, "group_size must be -1 or positive, got 0"),
        ("awq", {"group_size": 40}, r"AWQ needs K % group_size == 0, got 96, 40"),
        ("awq", {"zero_point": "yes"}, "zero_point must be true or false, got 'yes'"),
        ("awq", {"modules_to_not_convert": "x"}, "must be a list of strings, got 'x'"),
        ("awq", {"quant_method": "hqq"}, "quant_method 'hqq' is not supported"),
        ("gptq", {"bits": None}, "bits = 0 is not supported"),
        ("gptq", {"bits": True}, "bits = True is not supported"),
        ("gptq", {"bits": 3}, r"must be I32 \[3, 6\], got I32 \[3, 8\]"),
        ("gptq", {"group_size": 64}, r"must be I32 \[2, 8\], got I32 \[3, 8\]"),
        ("gptq", {"group_size": 10**30}, r"must be I32 \[1, 8\], got I32 \[3, 8\]"),
        ("gptq", {"checkpoint_format": "marlin"}, "GPTQ format 'marlin' is not supported"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        ("gptq", {"dynamic": {"+:(a+)+b": {}}}, "is too complex: it might take for ever"),
        ("gptq", {"dynamic": {"+:.*.*.*.*.*.*b": {}}}, "is too complex"),
        ("gptq", {"dynamic": {"+:(": {}}}, "is not valid"),
        ("gptq", {"dynamic": {"+:a": 3}}, "must be an object, got 3"),
        ("gptq", {"dynamic": {"+:a": {"bits": 5}}}, "bits = 5 is not supported"),
        ("pack-quantized", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is"),
        (
            "pack-quantized",
            {"format": "float-quantized"},
            r"which disagrees with .*\(format float-q",
        ),
        ("pack-quantized", {"transform_config": {"a": 1}}, "transform_config .* is not supported"),
        (
            "pack-quantized",
            {"sparsity_config": {"format": "x"}},
            "sparsity_config of format 'x' is not",
        ),
        ("pack-quantized", {"kv_cache_scheme": {"a": 1}}, "kv_cache_scheme is not supported"),
        ("pack-quantized", {"config_groups": []}, "config_groups must be an object"),
        ("pack-quantized", {"config_groups": {}}, "is quantised, which disagrees with"),
    ],
)
def test_configs(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Zoo(kind))
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        effllm.load(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "block"}, "strategy 'block' is not supported"),
        ({"type": "float"}, "weights of type 'float' is not supported"),
        ({"num_bits": 5}, "num_bits = 5 is not supported"),
    ],
)
def test_groups_of_compressed_tensors(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, Zoo("pack-quantized"))
    groups = Zoo("pack-quantized").quantization_config()["config_groups"]
    groups["group_0"]["weights"].update(changes)
    edit_config(tmp_path, config_groups=groups)
    with pytest.raises(CheckpointError, match=message):
        effllm.load(tmp_path, progress=False)
    groups["group_0"]["input_activations"] = {"num_bits": 8}
    edit_config(tmp_path, config_groups=groups)
    with pytest.raises(CheckpointError, match=r"quantised activations \(input_activations\)"):
        inspect(tmp_path)


def test_a_config_for_another_checkpoint(written: Written, llama: Any) -> None:
    path = written.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="num_hidden_layers must be at most the number of"):
        effllm.load(written.folder)
    path.write_text(json.dumps(config | {"num_attention_heads": 0, "head_dim": None}))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        effllm.load(written.folder)
    path.write_text(json.dumps({key: v for key, v in config.items() if key != "model_type"}))
    with pytest.raises(CheckpointError, match="not a config that transformers takes"):
        effllm.load(written.folder)
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="disagrees with no quantisation config"):
        effllm.load(written.folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="disagrees with no quantisation config"):
        effllm.load(written.folder)
    llama.save_pretrained(written.folder)
    edited = json.loads(path.read_text()) | {"quantization_config": config_of("awq")}
    path.write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match="quantised layers are needed"):
        effllm.load(written.folder)


def config_of(kind: str) -> dict[str, Any]:
    return Zoo(kind).quantization_config()
