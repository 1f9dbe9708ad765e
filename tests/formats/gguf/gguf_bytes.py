"""GGUF files put together by hand, and their blocks decoded value by value: what the tests compare
with. Written from the specification alone, without anything from effllm.formats."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

# type -> code, values and bytes per block, where its fp16 numbers are
BLOCKS = {
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """`dims` fastest first, as in the file."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def build(
    path: Path,
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    num_tensors: int | None = None,
    num_keys: int | None = None,
) -> Path:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    out = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(out + bytes(-len(out) % alignment) + data)
    return path


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """uint8 [count, bytes], any bits in the codes, finite numbers (also 0 and subnormal) in the
    scales."""
    _, _, size, halves = BLOCKS[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for position in halves:
        scales = rng.standard_normal(count).astype(np.float16)
        scales[::7] = 6e-8
        scales[3::7] = 0
        blocks[:, position : position + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks


def half(block: bytes, position: int) -> float:
    return float(struct.unpack_from("<e", block, position)[0])


def k_scale(block: bytes, j: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of sub-block j, from the 12 bytes at 4."""
    s = block[4:16]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) + 16 * (s[j - 4] >> 6), (s[j + 4] >> 4) + 16 * (s[j] >> 6)


def decode(kind: str, block: bytes) -> list[float]:
    """One block, value by value in double precision, rounded to fp32 once by the caller."""
    return [value(kind, block, i) for i in range(BLOCKS[kind][1])]


def value(kind: str, b: bytes, i: int) -> float:
    if kind == "Q8_0":
        return half(b, 0) * struct.unpack_from("<b", b, 2 + i)[0]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        start = BLOCKS[kind][2] - 16
        byte = b[start + i % 16]
        code = byte & 15 if i < 16 else byte >> 4
        if kind[1] == "5":
            code += 16 * (int.from_bytes(b[start - 4 : start], "little") >> i & 1)
        if kind[3] == "1":
            return half(b, 0) * code + half(b, 2)
        return half(b, 0) * (code - (8 if kind == "Q4_0" else 16))
    if kind in ("Q4_K", "Q5_K"):
        j, within = divmod(i, 32)
        scale, minimum = k_scale(b, j)
        byte = b[BLOCKS[kind][2] - 128 + 32 * (j // 2) + within]
        code = byte & 15 if j % 2 == 0 else byte >> 4
        if kind == "Q5_K":
            code += 16 * (b[16 + within] >> j & 1)
        return half(b, 0) * scale * code - half(b, 2) * minimum
    assert kind == "Q6_K"
    n, rest = divmod(i, 128)
    k, within = divmod(rest, 32)
    byte = b[64 * n + within + 32 * (k % 2)]
    code = (byte & 15 if k < 2 else byte >> 4) + 16 * (b[128 + 32 * n + within] >> 2 * k & 3)
    scale = struct.unpack_from("<b", b, 192 + i // 16)[0]
    return half(b, 208) * scale * (code - 32)
