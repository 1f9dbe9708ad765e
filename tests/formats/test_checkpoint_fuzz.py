"""Headers, indices and configs from nowhere: an error that names the file, or all that is there."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from bytes_zoo import Blockwise, Bytes, Sparse
from formats_zoo import Zoo, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import effllm
from effllm.formats import Checkpoint, CheckpointError, inspect
from effllm.formats.checkpoint import TORCH_DTYPES
from effllm.formats.config import parse_config


def outcome(run: Callable[[], Any]) -> tuple[str | None, Any]:
    """The error's text or the result; all other exceptions are bugs."""
    try:
        return None, run()
    except (CheckpointError, FileNotFoundError) as error:
        return str(error), None


# -- bytes -----------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        Zoo("pack-quantized", shards=2),
        Bytes("int-quantized", floats=False, symmetric=False, shards=2),
        Blockwise("nf4", nested=True, shards=2),
    ],
    ids=lambda kind: kind.id,
)
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_checkpoint(folder, request.param)
    return folder


def header_length(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bytes_give_an_error_or_a_report(sharded: Path, data: st.DataObject) -> None:
    files = sorted(sharded.glob("*.safetensors")) + sorted(sharded.glob("*.json"))
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    limit = header_length(path) if path.suffix == ".safetensors" else len(original)
    changed = bytearray(original)
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, limit - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        changed[position] = value
    cut = data.draw(st.sampled_from([len(changed), limit, limit // 2]))
    try:
        path.write_bytes(changed[:cut])
        error, _ = outcome(lambda: inspect(sharded))
        assert error is None or str(sharded) in error
    finally:
        path.write_bytes(original)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_load_another_model(sharded: Path, data: st.DataObject) -> None:
    """What loads has every weight: no tensor is missing, left over or of another shape."""
    path = data.draw(st.sampled_from(sorted(sharded.glob("*.safetensors"))))
    original = path.read_bytes()
    changed = bytearray(original)
    position = data.draw(st.integers(8, header_length(path) - 1))
    changed[position] = data.draw(st.sampled_from(b'0123456789FBI{}[]":,.'))
    try:
        path.write_bytes(changed)
        error, model = outcome(lambda: effllm.load(sharded, progress=False))
        assert error is None or str(sharded) in error
        assert model is None or not any(parameter.is_meta for parameter in model.parameters())
    finally:
        path.write_bytes(original)


def test_fuzzed_files_are_restored(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    assert effllm.load(tmp_path / "copy", progress=False) is not None


# -- structure -------------------------------------------------------------------------------------

SIZES = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 1 << 31, 1 << 62, 1 << 64, 2.0, True, None, "4", []])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
NAMES = st.sampled_from(["a", "b", "a.weight", "", "\0", "../a", "__metadata__"]) | st.text(
    max_size=3
)
DTYPES = st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "F4", "C64", "BOOL", "f32", "Q9", "", 4])


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header and a number of bytes of data that are right, but for a few values in most."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    for entry in header.values():
        for key, values in (
            ("dtype", DTYPES),
            ("shape", st.lists(SIZES, max_size=4)),
            ("data_offsets", st.lists(SIZES, max_size=3)),
            ("more", JUNK),
        ):
            if draw(st.integers(0, 5)) == 0:
                entry[key] = draw(values)
    return header, max(0, end + draw(st.sampled_from([0, 0, 0, -1, 1, 8])))


@settings(max_examples=200, deadline=None)
@given(found=headers())
def test_any_header(found: tuple[dict[str, Any], int], tmp_path_factory: Any) -> None:
    header, size = found
    folder = tmp_path_factory.getbasetemp() / "header"
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(size % 256)).ljust(size))
    error, checkpoint = outcome(lambda: Checkpoint(folder))
    if checkpoint is None:
        assert str(path) in error
        return
    # What is accepted covers the data exactly, and can be read, or its dtype is not known.
    assert checkpoint.tensors.keys() == header.keys() - {"__metadata__"}
    assert sum(info.end - info.start for info in checkpoint.tensors.values()) == size
    for name, info in checkpoint.tensors.items():
        error, tensor = outcome(lambda name=name: checkpoint.read(name))
        assert (error is None) == (info.dtype in TORCH_DTYPES)
        if tensor is not None:
            assert list(tensor.shape) == header[name]["shape"]
            assert tensor.dtype == TORCH_DTYPES[header[name]["dtype"]]
            assert tensor.nbytes == info.end - info.start


FILES = ["x.safetensors", "y.safetensors"]
TRICKS = ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.safetensors\0", "x.bin", "."]


@settings(max_examples=150, deadline=None)
@given(
    weight_map=st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([*FILES, *FILES, *TRICKS]) | JUNK,
        max_size=3,
    )
    | JUNK,
    more=JUNK,
)
def test_any_index(weight_map: Any, more: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "index"
    if not folder.exists():
        folder.mkdir()
        save_file({"a": torch.zeros(1)}, folder / "x.safetensors")
        save_file({"b": torch.ones(1)}, folder / "y.safetensors")
    index = folder / "model.safetensors.index.json"
    text = json.dumps({"metadata": more, "weight_map": weight_map})
    index.write_bytes(text.encode("utf-8", "surrogatepass"))
    error, checkpoint = outcome(lambda: Checkpoint(folder))
    right = {"a": FILES[0], "b": FILES[1]}
    if isinstance(weight_map, dict) and weight_map and weight_map.items() <= right.items():
        assert checkpoint.tensors.keys() == weight_map.keys()
    else:
        assert str(folder) in error


CONFIGS = [
    Zoo("awq"),
    Zoo("gptq", symmetric=True),
    Zoo("pack-quantized"),
    Bytes(strategy="block", sparsity="sparse-24-bitmask"),
    Bytes("fp8", strategy="block"),
    Sparse(),
    Blockwise("nf4"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested dicts and lists, but the outermost."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [(*path, key) for key, _ in inner]
    for key in list(found):
        child = value[key[-1]]
        if isinstance(child, dict | list):
            found += places(child, key)
    return found


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(CONFIGS), data=st.data())
def test_any_value_in_a_config(kind: Any, data: st.DataObject) -> None:
    config = kind.quantization_config() | {"dynamic": {"+:a": {"bits": 4}}}
    *path, last = data.draw(st.sampled_from(places(config)))
    owner = config
    for key in path:
        owner = owner[key]
    owner[last] = data.draw(
        JUNK | st.sampled_from(["re:(a+)+$", "re:(", 1 << 70, -1, 0, 1.5, [128, 128], {"x": {}}])
    )
    error, parsed = outcome(lambda: parse_config(Path("config.json"), config))
    if parsed is None:
        assert error.startswith("config.json: ")
        return
    scheme = parsed.scheme("model.layers.0.mlp.up_proj")
    assert scheme is None or (1 <= scheme.bits <= 16 and scheme.group_size >= -1)
