"""Files from nowhere: whatever the bytes, GgufFile answers or raises GgufError, soon and small."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_bytes import key, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effllm.formats.gguf import (
    GgufError,
    GgufFile,
    TensorSource,
    TensorType,
    dequantize,
    read_state_dict,
    write_gguf,
    write_model,
)
from effllm.formats.gguf.blocks import DECODED
from effllm.formats.gguf.rope import ROPE_FREQS

MAX_SECONDS = 5  # a broken file of this size takes well below 0.1; machines are shared
MAX_BYTES = 1 << 21


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of metadata and several types of tensors."""
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    metadata = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "number": 7,
        "real": np.float64(0.5),
        "flags": [True, False],
        "words": ["one", "", "three"],
        "ids": np.arange(9, dtype=np.uint64),
        "nested": [["a"], [[1, 2], [3]]],
    }
    kinds = (TensorType.F32, TensorType.F16, TensorType.Q4_0, TensorType.Q8_0)
    sources = [TensorSource.of(kind.name, torch.randn(2, 64), kind) for kind in kinds]
    write_gguf(path, metadata, sources)
    return path.read_bytes()


def open_and_read_all(path: Path, data: bytes) -> bool:
    """True if the file was accepted: then all of it must be readable."""
    path.write_bytes(data)
    start = time.monotonic()
    tracemalloc.start()
    try:
        file = GgufFile(path)
    except GgufError as error:
        message = str(error)
    else:
        message = ""
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MAX_BYTES
        assert time.monotonic() - start < MAX_SECONDS
    if message:
        assert message.startswith(f"{path}: ")
        assert len(message) < 1000
        return False
    for info in file.tensors.values():
        assert 0 < info.start <= info.end <= len(data)
        raw = file.raw(info.name)
        assert raw.numel() == info.end - info.start
        assert raw.numpy().tobytes() == data[info.start : info.end]
        if info.type in DECODED:
            assert dequantize(raw, info.type, info.shape).shape == info.shape
    return True


def header_size(data: bytes) -> int:
    """Flips there matter; the tensors' own bytes may be anything."""
    return len(data) - 2 * 64 * 4 - 2 * 64 * 2 - 4 * 18 - 4 * 34


@pytest.mark.parametrize("value", [0x00, 0x7F, 0xFF])
def test_each_byte_of_the_header_replaced(value: int, whole: bytes, tmp_path: Path) -> None:
    accepted = 0
    for position in range(header_size(whole)):
        data = bytearray(whole)
        data[position] = value
        accepted += open_and_read_all(tmp_path / "a.gguf", bytes(data))
    assert accepted < header_size(whole)


def test_each_bit_of_the_header_flipped(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    for position in range(header_size(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        open_and_read_all(tmp_path / "a.gguf", bytes(data))


PIECES = st.one_of(
    st.binary(max_size=24),
    st.sampled_from([0, 1, 8, 9, 32, 255, 2**31, 2**32 - 1]).map(lambda n: struct.pack("<I", n)),
    st.sampled_from([0, 1, 2, 32, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]).map(
        lambda n: struct.pack("<Q", n)
    ),
)
no_check = [HealthCheck.function_scoped_fixture]


@settings(max_examples=300, deadline=None, suppress_health_check=no_check)
@given(pieces=st.lists(PIECES, max_size=20), version=st.sampled_from([2, 3, 3, 3, 9]))
def test_random_headers(pieces: list[bytes], version: int, tmp_path: Path) -> None:
    data = b"GGUF" + struct.pack("<I", version) + b"".join(pieces)
    open_and_read_all(tmp_path / "a.gguf", data)


@settings(max_examples=300, deadline=None, suppress_health_check=no_check)
@given(data=st.data())
def test_slices_cut_repeated_and_overwritten(
    data: st.DataObject, whole: bytes, tmp_path: Path
) -> None:
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        end = min(len(changed), start + data.draw(st.integers(0, 40)))
        kind = data.draw(st.sampled_from(["cut", "repeat", "write", "truncate"]))
        if kind == "cut":
            del changed[start:end]
        elif kind == "repeat":
            changed[start:start] = changed[start:end]
        elif kind == "write":
            changed[start:end] = data.draw(PIECES)
        else:
            del changed[start:]
    open_and_read_all(tmp_path / "a.gguf", bytes(changed))


SIZES = st.sampled_from([0, 1, 2, 16, 32, 64, 256, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])


@settings(max_examples=300, deadline=None, suppress_health_check=no_check)
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "d"]),
            st.lists(SIZES, max_size=5),
            st.integers(0, 42),
            st.one_of(SIZES, st.sampled_from([96, 128, 160, 2**64 - 32])),
        ),
        max_size=5,
    ),
    values=st.lists(
        st.tuples(st.sampled_from(["k", "l", "general.alignment"]), st.integers(0, 14), PIECES),
        max_size=3,
    ),
    tail=st.integers(0, 400),
)
def test_random_tensors_and_values(
    tensors: list[tuple[str, list[int], int, int]],
    values: list[tuple[str, int, bytes]],
    tail: int,
    tmp_path: Path,
) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    header += b"".join(key(*value) for value in values)
    header += b"".join(tensor(n, tuple(dims), kind, at) for n, dims, kind, at in tensors)
    open_and_read_all(tmp_path / "a.gguf", header + bytes(tail))


SMALL = {"vocab_size": 5, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_broken_model_is_an_error_or_a_model(
    model_type: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """One random bit of the header and of the frequencies flipped, at every other byte."""
    path, rng = tmp_path / "a.gguf", random.Random(0)
    write_model(path, make_model(model_type, **SMALL, **MODELS[model_type]), TensorType.Q4_0)
    file = GgufFile(path)
    shapes = {name: value.shape for name, value in read_state_dict(file)}
    end = min(info.start for info in file.tensors.values() if info.name != ROPE_FREQS)
    whole = path.read_bytes()
    outcomes = []
    for position in range(8, end, 2):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            entries = list(read_state_dict(GgufFile(path)))
        except GgufError:
            outcomes.append(False)
        else:
            outcomes.append({name: value.shape for name, value in entries} == shapes)
    assert 0 < sum(outcomes) < len(outcomes)


def test_the_unchanged_file_is_accepted(whole: bytes, tmp_path: Path) -> None:
    assert open_and_read_all(tmp_path / "a.gguf", whole)
