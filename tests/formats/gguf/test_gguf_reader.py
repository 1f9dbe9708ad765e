"""GgufFile: files put together byte by byte, files of the gguf package, and broken ones."""

from __future__ import annotations

import gc
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_bytes import build, key, tensor, text

from effllm.formats.gguf import GgufError, GgufFile, TensorType, dequantize, quantize

NEEDS_GGUF = "needs the extra effllm[formats] (gguf)"

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def u32(name: str | bytes, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def array(name: str, kind: int, count: int, data: bytes) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", kind, count) + data)


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value(tmp_path: Path, version: int) -> None:
    packed = [
        (0, "B", 255),
        (1, "b", -128),
        (2, "H", 65535),
        (3, "h", -32768),
        (4, "I", 2**32 - 1),
        (5, "i", -(2**31)),
        (6, "f", 0.1),
        (10, "Q", 2**64 - 1),
        (11, "q", -(2**63)),
        (12, "d", 0.1),
    ]
    keys = [key(f"k{kind}", kind, struct.pack("<" + code, value)) for kind, code, value in packed]
    keys += [array(f"a{kind}", kind, 3, struct.pack("<3" + c, v, 0, 1)) for kind, c, v in packed]
    keys += [key("yes", BOOL, b"\1"), key("no", BOOL, b"\0"), array("flags", BOOL, 2, b"\1\0")]
    keys += [
        key("text", STRING, text("h\u00e9\0")),
        array("texts", STRING, 2, text("") + text("b")),
    ]
    inner = struct.pack("<IQ", 0, 2) + b"\7\10" + struct.pack("<IQ", STRING, 1) + text("in")
    keys += [array("nested", ARRAY, 2, inner), array("empty", F32, 0, b"")]
    file = GgufFile(build(tmp_path / "a.gguf", keys, [], version=version))
    assert file.version == version
    for kind, code, value in packed:
        (expected,) = struct.unpack("<" + code, struct.pack("<" + code, value))
        assert file.metadata[f"k{kind}"] == expected
        found = file.metadata[f"a{kind}"]
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.dtype("<" + code)
        assert found.tolist() == [expected, 0, 1]
    assert (file.metadata["yes"], file.metadata["no"]) == (True, False)
    assert np.array_equal(file.metadata["flags"], [True, False])
    assert (file.metadata["text"], file.metadata["texts"]) == ("h\u00e9\0", ["", "b"])
    nested: Any = file.metadata["nested"]
    assert (nested[0].tolist(), nested[1]) == ([7, 8], ["in"])
    assert np.size(file.metadata["empty"]) == 0
    assert file.tensors == {}


def test_shapes_are_reversed_and_bytes_are_where_they_belong(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    two = quantize(torch.randn(2, 64), TensorType.Q8_0)
    infos = [
        tensor("two", (64, 2), 8, 64),
        tensor("one", (3, 2, 1), 0, 0),
        tensor("scalar", (), 0, 256),
        tensor("none", (5, 0), 0, 256),
    ]
    data = bytes(one.view(torch.uint8).tolist()).ljust(64, b"\0") + bytes(two.tolist())
    data = data.ljust(256, b"\0") + struct.pack("<f", 7.0)
    file = GgufFile(build(tmp_path / "a.gguf", [], infos, data))
    assert list(file.tensors) == ["two", "one", "scalar", "none"]
    assert {name: info.shape for name, info in file.tensors.items()} == {
        "two": (2, 64),
        "one": (1, 2, 3),
        "scalar": (),
        "none": (0, 5),
    }
    assert file.tensors["two"].type == TensorType.Q8_0
    assert torch.equal(dequantize(file.raw("one"), TensorType.F32, (1, 2, 3)).flatten(), one)
    assert torch.equal(file.raw("two"), two)
    assert dequantize(file.raw("scalar"), TensorType.F32, ()) == 7
    assert file.raw("none").shape == (0,)
    assert "tensors=4" in repr(file)
    with pytest.raises(GgufError, match=r"a\.gguf: there is no tensor 'three' among the 4"):
        file.raw("three")


def test_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    keys = [u32("general.alignment", 128)]
    infos = [tensor("a", (1,), 0, 0), tensor("b", (1,), 0, 128)]
    data = struct.pack("<f124xf", 1.0, 2.0)
    file = GgufFile(build(tmp_path / "a.gguf", keys, infos, data, alignment=128))
    assert file.tensors["a"].start % 128 == 0
    assert dequantize(file.raw("b"), TensorType.F32, (1,)) == 2


def test_a_tensor_outlives_its_file_and_changes_nothing(tmp_path: Path) -> None:
    path = build(tmp_path / "a.gguf", [], [tensor("a", (2,), 0, 0)], struct.pack("<2f", 1.0, 2.0))
    before = path.read_bytes()
    raw = GgufFile(path).raw("a")
    gc.collect()
    assert dequantize(raw, TensorType.F32, (2,)).tolist() == [1, 2]
    raw.zero_()
    path.unlink()  # the mapping stays
    assert raw.tolist() == [0] * 8
    path.write_bytes(before)
    assert dequantize(GgufFile(path).raw("a"), TensorType.F32, (2,)).tolist() == [1, 2]


def test_reading_copies_no_tensor(tmp_path: Path) -> None:
    path = build(tmp_path / "a.gguf", [], [tensor("a", (1 << 28,), 0, 0)])
    os.truncate(path, path.stat().st_size + (1 << 30))  # a hole
    tracemalloc.start()
    raw = GgufFile(path).raw("a")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert raw.shape == (1 << 30,)
    assert raw[-1] == 0


def test_what_is_released_is_read_again(tmp_path: Path) -> None:
    infos = [tensor("a", (3000,), 0, 0), tensor("b", (2,), 0, 12000), tensor("c", (0,), 0, 0)]
    data = struct.pack("<3002f", *range(3000), 1.0, 2.0)
    file = GgufFile(build(tmp_path / "a.gguf", [], infos, data))
    raw = file.raw("a")
    for name in file.tensors:
        file.release(name)
    assert dequantize(raw, TensorType.F32, (3000,)).tolist() == list(range(3000))
    assert dequantize(file.raw("b"), TensorType.F32, (2,)).tolist() == [1, 2]
    with pytest.raises(GgufError, match="there is no tensor 'd' among the 3"):
        file.release("d")


def deep_array(depth: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQ", 0, 1) + b"\5"


F = ("f", (8,), 0)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"GGML"}, r"not a GGUF file: starts with b'GGML', not b'GGUF'"),
    "version 1": ({"version": 1}, "GGUF version 1, only 2 and 3 can be read"),
    "version 4": ({"version": 4}, "GGUF version 4"),
    "big-endian": ({"version": 3 << 24}, "big-endian"),
    "tensor count": ({"num_tensors": 2**64 - 1}, "18446744073709551615 tensors, at most 131072"),
    "key count": ({"num_keys": 2**63}, "metadata keys, at most 65536"),
    "tensors for the size": ({"num_tensors": 9}, "9 tensors need at least 216 bytes"),
    "keys for the size": ({"num_keys": 30}, "30 metadata keys need at least 390 bytes"),
    "key twice": ({"keys": [u32("a.b", 1), u32("a.b", 1)]}, "metadata key 'a.b' appears twice"),
    "key length": ({"keys": [u32(b"k" * 65536, 1)]}, "metadata key 0 has 65536 bytes, at most 655"),
    "key not UTF-8": ({"keys": [u32(b"a\xff", 1)]}, "metadata key 0 is not UTF-8"),
    "value type": ({"keys": [key("k", 13, bytes(8))]}, "metadata key 'k' has the unknown type 13"),
    "bool": ({"keys": [key("k", BOOL, b"\2")]}, "metadata key 'k' is a bool of value 2"),
    "bools": ({"keys": [array("k", BOOL, 2, b"\1\3")]}, "metadata key 'k' has a bool of value 3"),
    "string length": (
        {"keys": [key("k", STRING, struct.pack("<Q", 2**63))]},
        "metadata key 'k' has 9223372036854775808 bytes",
    ),
    "string end": (
        {"keys": [key("k", STRING, struct.pack("<Q", 999))]},
        "metadata key 'k': 999 bytes are needed",
    ),
    "string not UTF-8": ({"keys": [key("k", STRING, text(b"\xc3("))]}, "'k' is not UTF-8"),
    "array length": (
        {"keys": [array("k", U64, 2**61, b"")]},
        "array of 2305843009213693952, at mo",
    ),
    "array end": ({"keys": [array("k", U64, 999, b"")]}, "metadata key 'k': 7992 bytes are needed"),
    "strings end": (
        {"keys": [array("k", STRING, 99, b"")]},
        "is an array of 99, .* bytes are left",
    ),
    "array type": ({"keys": [array("k", 99, 0, b"")]}, "metadata key 'k' has the unknown type 99"),
    "nesting": ({"keys": [key("k", ARRAY, deep_array(5))]}, "nests arrays deeper than 4"),
    "alignment 0": ({"keys": [u32("general.alignment", 0)]}, r"from 8 to 2\*\*20, got 0"),
    "alignment 24": ({"keys": [u32("general.alignment", 24)]}, "a power of two"),
    "alignment 2**31": ({"keys": [u32("general.alignment", 1 << 31)]}, r"got 2147483648"),
    "alignment type": ({"keys": [key("general.alignment", BOOL, b"\1")]}, "an integer, got bool"),
    "tensor twice": ({"tensors": [tensor(*F, 0), tensor(*F, 32)]}, "tensor 'f' appears twice"),
    "dimensions": ({"tensors": [tensor("t", (1,) * 5, 0, 0)]}, "'t' has 5 dimensions, at most 4"),
    "tensor type": ({"tensors": [tensor("t", (32,), 4, 0)]}, "'t' has the unknown type 4"),
    "offset": ({"tensors": [tensor(*F, 16)]}, "'f' is at offset 16, which is no multiple of 32"),
    "huge offset": ({"tensors": [tensor(*F, 2**64 - 32)]}, "'f' .* the file has"),
    "end": (
        {"tensors": [tensor("t", (33,), 0, 0)]},
        r"'t' \(F32 \[33\]\) ends at byte \d+, the file",
    ),
    "overflow": ({"tensors": [tensor("t", (2**32, 2**32), 0, 0)]}, r"more than 2\*\*63 - 1"),
    "overflow of 0": ({"tensors": [tensor("t", (0, 2**62, 4), 0, 0)]}, r"more than 2\*\*63 - 1"),
    "2**60 values": ({"tensors": [tensor("t", (2**60,), 0, 0)]}, "'t' .* the file has"),
    "block": (
        {"tensors": [tensor("t", (16, 4), 2, 0)]},
        "rows of 16 values, Q4_0 needs a multiple",
    ),
    "scalar block": ({"tensors": [tensor("t", (), 2, 0)]}, "rows of 1 values, Q4_0 needs"),
    "overlap": (
        {"tensors": [tensor("b", (9,), 0, 0), tensor("a", (1,), 0, 32)]},
        "tensor 'a' starts at byte 128, inside 'b', which ends at 132",
    ),
    "same place": ({"tensors": [tensor(*F, 0), tensor("g", (1,), 0, 0)]}, "inside 'f'|inside 'g'"),
    "control characters": (
        {"tensors": [tensor("\x1b[2J\n", (1,), 0, 8)]},
        r"tensor '\\x1b\[2J\\n' is",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_clear_error(case: str, tmp_path: Path) -> None:
    options, message = BROKEN[case]
    options = {"keys": [], "tensors": [], "data": bytes(128)} | options
    path = build(tmp_path / "broken.gguf", **options)
    with pytest.raises(GgufError, match=message) as error:
        GgufFile(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    keys = [u32("a", 1), array("b", STRING, 2, text("xy") + text("")), key("c", BOOL, b"\1")]
    infos = [tensor("t", (8,), 0, 0), tensor("u", (32,), 2, 32)]
    whole = build(tmp_path / "a.gguf", keys, infos, bytes(50)).read_bytes()
    GgufFile(tmp_path / "a.gguf")
    for size in range(len(whole)):
        (tmp_path / "a.gguf").write_bytes(whole[:size])
        with pytest.raises(GgufError):
            GgufFile(tmp_path / "a.gguf")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GgufFile(tmp_path / "missing.gguf")
    with pytest.raises(GgufError, match="not a regular file"):
        GgufFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GgufError, match="not a regular file"):
        GgufFile(tmp_path / "pipe")


def test_the_limit_on_values_is_for_the_whole_file(tmp_path: Path) -> None:
    half = 1 << 21
    keys = [array(name, 0, half + 1, bytes(half + 1)) for name in ("a", "b")]
    with pytest.raises(
        GgufError, match=r"'b' is an array of 2097153, at most 4194304 values .* all"
    ):
        GgufFile(build(tmp_path / "a.gguf", keys, []))


def test_a_header_as_large_as_allowed_takes_seconds(tmp_path: Path) -> None:
    keys = [array("a", STRING, 1 << 20, text("ab") * (1 << 20))]
    infos = [tensor(f"t{index}", (1,), 24, 32 * index) for index in range(1 << 14)]
    path = build(tmp_path / "a.gguf", keys, infos, bytes(32 << 14))
    start = time.monotonic()
    file = GgufFile(path)
    assert time.monotonic() - start < 30
    assert np.size(file.metadata["a"]) == 1 << 20
    assert len(file.tensors) == 1 << 14


def test_files_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf.gguf_writer", reason=NEEDS_GGUF)
    from gguf import GGMLQuantizationType, GGUFValueType, quants

    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_block_count(3)
    writer.add_rope_freq_base(5e5)
    writer.add_array("tokens", ["a", "\u00df", ""])
    writer.add_key_value("ids", [1, -2], GGUFValueType.ARRAY, GGUFValueType.INT64)
    writer.add_bool("flag", True)
    weight = np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32)
    kinds = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    stored = {kind: quants.quantize(weight, GGMLQuantizationType[kind]) for kind in kinds}
    for kind, data in stored.items():
        writer.add_tensor(kind, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GgufFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 3
    assert file.metadata["llama.rope.freq_base"] == 5e5
    assert file.metadata["tokens"] == ["a", "\u00df", ""]
    assert np.asarray(file.metadata["ids"]).tolist() == [1, -2]
    assert file.metadata["flag"] is True
    for kind, data in stored.items():
        info = file.tensors[kind]
        assert (info.shape, info.type.name, info.start % 64) == ((6, 256), kind, 0)
        expected = quants.dequantize(data, GGMLQuantizationType[kind]).astype(np.float32)
        found = dequantize(file.raw(kind), info.type, info.shape)
        assert torch.equal(found, torch.from_numpy(expected))
