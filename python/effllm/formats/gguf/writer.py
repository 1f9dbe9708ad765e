"""write_gguf: GGUF version 3, one tensor at a time."""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from effllm.formats.gguf.blocks import as_blocks, quantize
from effllm.formats.gguf.spec import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_KEY_BYTES,
    NUMBERS,
    GgufError,
    TensorType,
    ValueType,
    check_alignment,
    quote,
)

_VERSION = 3
# The buffer that ggml reads names into holds 64 bytes, a closing zero included.
_MAX_NAME_BYTES = 63


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written.

    Attributes:
        name: at most 63 bytes of UTF-8.
        shape: in PyTorch's order, at most 4 dimensions; the last a multiple of the type's block.
        type: F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K or Q6_K; any type for bytes that are stored
            already.
        read: called once, when it is the tensor's turn. Returns floats of ``shape``, or uint8
            ``[bytes]``: the blocks as they shall be stored.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor, tensor_type: TensorType) -> TensorSource:
        """A float tensor that is in memory."""
        return cls(name, tuple(tensor.shape), tensor_type, lambda: tensor)

    @property
    def size(self) -> int:
        """Bytes in the file, without padding."""
        return prod(self.shape) // self.type.block_values * self.type.block_bytes


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorSource],
    progress: bool = False,
) -> None:
    """Writes a GGUF file, whole or not at all: it takes its name once it is complete.

    Args:
        path: replaced if it exists.
        metadata: values are bool; int (stored as uint32, int32, uint64 or int64, the first that
            holds it); float (float32, which readers expect); str; numpy scalars and 1-D arrays,
            stored as their own dtype; lists of values of one kind, where ints are int32 or int64.
            A ``general.alignment`` is obeyed.
        tensors: stored in this order. Never more than one is held in encoded form.
        progress: show a progress bar.

    Raises:
        GgufError: a value, name, shape or type cannot be stored; the message names it. Nothing is
            left behind then, nor after any other exception.
    """
    target = Path(path)
    sources = list(tensors)
    alignment = check_alignment(metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
    header = _header(metadata, sources, alignment)
    # In the same folder, as a rename does not cross file systems.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            file.write(header)
            bar = tqdm(sources, desc="save", unit="tensor", leave=False, disable=not progress)
            for source in bar:
                data = _encoded(source)
                file.write(data.numpy().data)
                file.write(bytes(-source.size % alignment))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _encoded(source: TensorSource) -> Tensor:
    """uint8 ``[size]`` on the CPU, contiguous."""
    tensor = source.read().detach().cpu()
    try:
        if tensor.dtype == torch.uint8:
            return as_blocks(tensor, source.type, source.shape).flatten().contiguous()
        if tuple(tensor.shape) != source.shape:
            raise GgufError(f"announced as {list(source.shape)}, but read as {list(tensor.shape)}")
        return quantize(tensor, source.type)
    except GgufError as error:
        raise GgufError(f"tensor {quote(source.name)}: {error}") from error


def _header(metadata: Mapping[str, Any], sources: list[TensorSource], alignment: int) -> bytes:
    out = bytearray(MAGIC)
    out += struct.pack("<IQQ", _VERSION, len(sources), len(metadata))
    for key, value in metadata.items():
        out += _string(key, MAX_KEY_BYTES, f"metadata key {quote(key)}")
        kind, data = _value(value, f"metadata key {quote(key)}")
        out += struct.pack("<I", kind) + data
    offset = 0
    seen = set()
    for source in sources:
        what = f"tensor {quote(source.name)}"
        if source.name in seen:
            raise GgufError(f"{what} appears twice")
        seen.add(source.name)
        if len(source.shape) > MAX_DIMS:
            raise GgufError(f"{what} has {len(source.shape)} dimensions, at most {MAX_DIMS} fit")
        row = source.shape[-1] if source.shape else 1
        if row % source.type.block_values:
            raise GgufError(
                f"{what} has rows of {row} values, {source.type.name} needs a multiple of "
                f"{source.type.block_values}"
            )
        out += _string(source.name, _MAX_NAME_BYTES, what)
        out += struct.pack(f"<I{len(source.shape)}Q", len(source.shape), *source.shape[::-1])
        out += struct.pack("<IQ", source.type, offset)
        offset += -(-source.size // alignment) * alignment
    return bytes(out) + bytes(-len(out) % alignment)


def _string(text: str, limit: int, what: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise GgufError(f"{what} is not Unicode: {error.reason}") from None
    if len(data) > limit:
        raise GgufError(f"{what} has {len(data)} bytes, at most {limit} fit")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any, what: str) -> tuple[ValueType, bytes]:
    """The type of a metadata value, and its bytes."""
    if isinstance(value, np.ndarray | np.generic):
        return _numpy_value(value, what)
    if isinstance(value, bool):
        return ValueType.BOOL, bytes([value])
    if isinstance(value, int):
        kind = _int_type((value,), "IiQq", what)
        return kind, struct.pack("<" + NUMBERS[kind], value)
    if isinstance(value, float):
        return ValueType.FLOAT32, _float32(value, what)
    if isinstance(value, str):
        return ValueType.STRING, _string(value, 1 << 24, what)
    if isinstance(value, list | tuple):
        return ValueType.ARRAY, _list(value, what)
    raise GgufError(f"{what} holds a {type(value).__name__}, which GGUF cannot store")


def _list(values: list[Any] | tuple[Any, ...], what: str) -> bytes:
    """The bytes of an array: type of the elements, their number, and they."""
    if not values:
        raise GgufError(f"{what} is an empty list of no type; use an empty numpy array")
    if all(type(value) is int for value in values):
        kind = _int_type(values, "iqQ", what)
        return _array(kind, len(values), struct.pack(f"<{len(values)}{NUMBERS[kind]}", *values))
    kinds, parts = zip(*(_value(value, what) for value in values), strict=True)
    if len(set(kinds)) > 1:
        found = ", ".join(sorted({kind.name for kind in kinds}))
        raise GgufError(f"{what} is a list of several types: {found}")
    return _array(kinds[0], len(values), b"".join(parts))


def _array(kind: ValueType, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


def _numpy_value(value: np.ndarray[Any, Any] | np.generic, what: str) -> tuple[ValueType, bytes]:
    types = {np.dtype("<" + code): kind for kind, code in NUMBERS.items()}
    types[np.dtype(np.bool_)] = ValueType.BOOL
    little = np.asarray(value)
    little = little.astype(little.dtype.newbyteorder("<"))
    kind = types.get(little.dtype)
    if kind is None or little.ndim > 1:
        raise GgufError(f"{what} holds numpy {little.dtype} of {little.ndim} dimensions")
    data = little.tobytes()
    return (kind, data) if little.ndim == 0 else (ValueType.ARRAY, _array(kind, len(little), data))


def _int_type(values: Iterable[int], codes: str, what: str) -> ValueType:
    """The first of the types that holds all values."""
    low, high = min(values), max(values)
    for code in codes:
        limits = np.iinfo(np.dtype("<" + code))
        if limits.min <= low and high <= limits.max:
            return next(kind for kind, other in NUMBERS.items() if other == code)
    raise GgufError(f"{what} holds an integer of more than 64 bits")


def _float32(value: float, what: str) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        raise GgufError(f"{what}: {value} is too large for float32; use numpy.float64") from None
