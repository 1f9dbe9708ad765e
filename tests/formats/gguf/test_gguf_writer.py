"""write_gguf: read back by our reader and by the gguf package, and what must not be written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.formats.gguf import (
    GgufError,
    GgufFile,
    TensorSource,
    TensorType,
    dequantize,
    quantize,
    write_gguf,
)

NEEDS_GGUF = "needs the extra effllm[formats] (gguf)"

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "small": 3,
    "negative": -3,
    "large": 2**40,
    "largest": 2**64 - 1,
    "lowest": -(2**63),
    "real": 0.1,
    "double": np.float64(0.1),
    "byte": np.uint8(7),
    "flag": True,
    "flags": [True, False],
    "ints": [1, -2],
    "reals": [0.5, 0.1],
    "texts": ["", "\u00df"],
    "numbers": np.arange(3, dtype=np.int16),
    "none": np.array([], np.float32),
    "nested": [[1], ["a", "b"]],
}
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q8_0"]


def sources(weight: torch.Tensor) -> list[TensorSource]:
    return [TensorSource.of(f"{kind}.weight", weight, TensorType[kind]) for kind in KINDS]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    weight = torch.randn(3, 2, 96)
    write_gguf(tmp_path / "a.gguf", METADATA, sources(weight))
    file = GgufFile(tmp_path / "a.gguf")
    assert file.version == 3
    assert list(file.metadata) == list(METADATA)
    nested: Any = file.metadata.pop("nested")
    assert [plain(part) for part in nested] == METADATA["nested"]
    for key, found in file.metadata.items():
        expected = METADATA[key]
        if key in ("real", "reals"):
            expected = np.float32(expected)
        assert plain(found) == plain(expected), key
    assert getattr(file.metadata["numbers"], "dtype", None) == np.int16
    assert list(file.tensors) == [f"{kind}.weight" for kind in KINDS]
    for kind in KINDS:
        info = file.tensors[f"{kind}.weight"]
        assert (info.shape, info.type.name, info.start % 32) == ((3, 2, 96), kind, 0)
        assert torch.equal(file.raw(info.name), quantize(weight, info.type))
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_rewriting_a_file_gives_the_same_bytes(tmp_path: Path) -> None:
    metadata = {"general.alignment": 256, **METADATA}
    write_gguf(tmp_path / "a.gguf", metadata, sources(torch.randn(5, 32)))
    file = GgufFile(tmp_path / "a.gguf")
    assert all(info.start % 256 == 0 for info in file.tensors.values())
    again = [
        TensorSource(info.name, info.shape, info.type, lambda name=info.name: file.raw(name))
        for info in file.tensors.values()
    ]
    # Python has one float type, so that the one float64 must be named anew.
    metadata = {**file.metadata, "double": np.float64(0.1), "byte": np.uint8(7)}
    write_gguf(tmp_path / "b.gguf", metadata, again)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_the_gguf_package_reads_our_files(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf.gguf_reader", reason=NEEDS_GGUF)
    from gguf import quants

    weight = torch.randn(4, 3, 64)
    # Its reader knows neither empty nor nested arrays of several types.
    metadata = {key: METADATA[key] for key in METADATA if key not in ("none", "nested")}
    write_gguf(tmp_path / "a.gguf", metadata, sources(weight))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, expected in metadata.items():
        found = reader.get_field(key).contents()
        wanted = plain(expected)
        if key in ("real", "reals"):
            wanted = np.float32(wanted).tolist()
        assert plain(found) == wanted, key
    types = {key: [kind.name for kind in reader.get_field(key).types] for key in metadata}
    assert types["small"] == ["UINT32"]
    assert types["negative"] == ["INT32"]
    assert types["large"] == types["largest"] == ["UINT64"]
    assert types["lowest"] == ["INT64"]
    assert (types["real"], types["double"]) == (["FLOAT32"], ["FLOAT64"])
    assert types["ints"] == ["ARRAY", "INT32"]
    for kind, tensor in zip(KINDS, reader.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type.name) == (f"{kind}.weight", kind)
        assert tuple(tensor.shape[::-1]) == (4, 3, 64)
        expected = dequantize(quantize(weight, TensorType[kind]), TensorType[kind], (4, 3, 64))
        found = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert torch.equal(torch.from_numpy(found).view(4, 3, 64), expected)


@settings(max_examples=60, deadline=None)
@given(
    metadata=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda key: key != "general.alignment"),
        st.one_of(
            st.booleans(),
            st.integers(-(2**63), 2**64 - 1),
            st.floats(width=32, allow_nan=False),
            st.text(max_size=20),
            st.lists(st.text(max_size=5), min_size=1, max_size=4),
            st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
            st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
        ),
        max_size=8,
    ),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=4),
)
def test_any_metadata_and_shapes(
    metadata: dict[str, Any], shapes: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.gguf"
    tensors = [torch.randn(shape) for shape in shapes]
    write_gguf(
        path,
        metadata,
        [TensorSource.of(f"t{i}", t, TensorType.F32) for i, t in enumerate(tensors)],
    )
    file = GgufFile(path)
    assert {key: plain(value) for key, value in file.metadata.items()} == metadata
    for i, tensor in enumerate(tensors):
        found = dequantize(file.raw(f"t{i}"), TensorType.F32, file.tensors[f"t{i}"].shape)
        assert torch.equal(found, tensor)


def source(name: str = "t", shape: tuple[int, ...] = (32,), kind: str = "F32") -> TensorSource:
    return TensorSource.of(name, torch.zeros(shape), TensorType[kind])


BAD: list[tuple[dict[str, Any], list[TensorSource], str]] = [
    ({"k": None}, [], "metadata key 'k' holds a NoneType"),
    ({"k": {}}, [], "holds a dict"),
    ({"k": []}, [], "metadata key 'k' is an empty list"),
    ({"k": [1, "a"]}, [], "a list of several types: STRING, UINT32"),
    ({"k": 2**64}, [], "metadata key 'k' holds an integer of more than 64 bits"),
    ({"k": 1e300}, [], "too large for float32"),
    ({"k": np.zeros((2, 2))}, [], "numpy float64 of 2 dimensions"),
    ({"k": np.complex64(1)}, [], "numpy complex64"),
    ({"k": "\ud800"}, [], "metadata key 'k' is not Unicode"),
    ({"k" * 65536: 1}, [], "65536 bytes, at most 65535"),
    ({"general.alignment": 12}, [], "a power of two"),
    ({}, [source(), source()], "tensor 't' appears twice"),
    ({}, [source("n" * 64)], "64 bytes, at most 63"),
    ({}, [source(shape=(1,) * 5)], "tensor 't' has 5 dimensions"),
    ({}, [source(shape=(2, 48), kind="Q8_0")], "'t' has rows of 48 values, Q8_0 needs"),
    ({}, [source(), source("u", (256,), "Q5_K")], "tensor 'u': type Q5_K has no encoder"),
    (
        {},
        [TensorSource("t", (4,), TensorType.F32, lambda: torch.zeros(5))],
        r"tensor 't': announced as \[4\], but read as \[5\]",
    ),
    (
        {},
        [TensorSource("t", (32,), TensorType.Q4_0, lambda: torch.zeros(17, dtype=torch.uint8))],
        r"tensor 't': Q4_0 \[32\] needs 18 bytes",
    ),
    (
        {},
        [TensorSource.of("t", torch.full((32,), float("nan")), TensorType.Q4_0)],
        "tensor 't': values are not finite",
    ),
]


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"), BAD, ids=[message for _, _, message in BAD]
)
def test_what_cannot_be_stored_leaves_the_old_file(
    metadata: dict[str, Any], tensors: list[TensorSource], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(GgufError, match=message):
        write_gguf(path, metadata, tensors)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt() -> torch.Tensor:
        raise KeyboardInterrupt

    late = TensorSource("b", (4,), TensorType.F32, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "a.gguf", {}, [source("a"), late])
    assert os.listdir(tmp_path) == []


def test_tensors_are_read_one_at_a_time_in_order(tmp_path: Path) -> None:
    seen: list[str] = []

    def read(name: str) -> torch.Tensor:
        assert [re.sub(r"\.[0-9a-f]{16}$", "", n) for n in os.listdir(tmp_path)] == [".a.gguf"]
        seen.append(name)
        return torch.zeros(4)

    names = ["b", "a", "c"]
    lazy = [TensorSource(n, (4,), TensorType.F16, lambda n=n: read(n)) for n in names]
    write_gguf(tmp_path / "a.gguf", {}, lazy)
    assert seen == names
