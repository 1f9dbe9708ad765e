"""GgufFile: reads GGUF files that nobody vouches for, without copying their tensors."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from effllm.formats.gguf.spec import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_KEY_BYTES,
    NUMBERS,
    VERSIONS,
    GgufError,
    TensorType,
    ValueType,
    check_alignment,
    quote,
)

Value: TypeAlias = "int | float | bool | str | np.ndarray[Any, Any] | list[Value]"
"""A metadata value. Arrays are numpy arrays of the file's dtype; of strings and arrays, lists."""

# Far above all that real files have, and low enough that reading them takes seconds: the largest
# vocabularies have 256 thousand tokens, a score, a type and a merge each.
_MAX_TENSORS = 1 << 17
_MAX_KEYS = 1 << 16
_MAX_VALUES = 1 << 22
_MAX_STRING_BYTES = 1 << 24
_MAX_NESTING = 4

# The least that one element takes in the file, so that a count is refused before memory is given.
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
_MIN_KEY_BYTES = 8 + 4 + 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in NUMBERS.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file.

    Attributes:
        name: unique in the file.
        shape: in PyTorch's order; the last dimension is the one in which values are neighbours.
        type: how values are stored.
        start, end: byte range in the file; ``end - start`` is what shape and type need.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    end: int


class GgufFile:
    """The metadata of a GGUF file (version 2 or 3, little-endian), and its tensors on demand.

    Opening reads the header alone and checks all of it, the byte range of every tensor included;
    ``raw`` then cannot fail. The file is mapped, not read: the mapping lives as long as this object
    or any tensor from it, and, as with every mapped file, nobody may shorten the file meanwhile.

    Attributes:
        path: as given.
        version: 2 or 3.
        metadata: ``dict[str, Value]`` in the order of the file.
        tensors: ``dict[str, TensorInfo]`` in the order of the file.

    Raises:
        GgufError (a ValueError): the file is not GGUF, is truncated, breaks the specification (a
            duplicate name, a tensor that overlaps another or is not aligned, a bool that is
            neither 0 nor 1, ...), or exceeds what any model needs. The message names the file, the
            tensor or key, and what was found and needed.
        OSError: the file cannot be opened.

    Source: the GGUF specification, docs/gguf.md in ggml-org/ggml.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # Asked before opening: opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            self._fail("not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(MAGIC):
                self._fail(f"not a GGUF file: {size} bytes")
            # A private mapping is writable, as torch wants its memory, and never reaches the file.
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        header = _Header(self._map, self.path)
        self.version = header.version()
        num_tensors = header.count("tensors", _MAX_TENSORS, _MIN_TENSOR_BYTES)
        num_keys = header.count("metadata keys", _MAX_KEYS, _MIN_KEY_BYTES)
        self.metadata = header.metadata(num_keys)
        try:
            alignment = check_alignment(self.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
        except GgufError as error:
            self._fail(str(error))
        infos = header.tensor_infos(num_tensors)
        data_start = -(-header.position // alignment) * alignment
        self.tensors = {
            name: self._place(name, shape, kind, offset, data_start, alignment)
            for name, (shape, kind, offset) in infos.items()
        }
        self._refuse_overlaps()

    def raw(self, name: str) -> Tensor:
        """The stored bytes of one tensor, without a copy: uint8 ``[end - start]`` on the CPU.

        Writing to it changes no file. Raises GgufError if there is no such tensor.
        """
        info = self._info(name)
        if info.start == info.end:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(
            self._map, dtype=torch.uint8, count=info.end - info.start, offset=info.start
        )

    def release(self, name: str) -> None:
        """Gives back the memory that reading one tensor has taken; ``raw`` reads it again.

        What was written to a result of ``raw`` is lost, in this tensor and where it ends.
        Raises GgufError if there is no such tensor.
        """
        info = self._info(name)
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if info.start < info.end:
            self._map.madvise(mmap.MADV_DONTNEED, start, info.end - start)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            self._fail(f"there is no tensor {quote(name)} among the {len(self.tensors)}")
        return info

    def __repr__(self) -> str:
        return (
            f"GgufFile({self.path!r}, version={self.version}, tensors={len(self.tensors)}, "
            f"metadata={len(self.metadata)})"
        )

    def _place(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: TensorType,
        offset: int,
        data_start: int,
        alignment: int,
    ) -> TensorInfo:
        if offset % alignment:
            self._fail(
                f"tensor {quote(name)} is at offset {offset}, which is no multiple of {alignment}"
            )
        row = shape[-1] if shape else 1
        if row % kind.block_values:
            self._fail(
                f"tensor {quote(name)} has rows of {row} values, {kind.name} needs a multiple of "
                f"{kind.block_values}"
            )
        start = data_start + offset
        end = start + prod(shape) // kind.block_values * kind.block_bytes
        if end > len(self._map):
            self._fail(
                f"tensor {quote(name)} ({kind.name} {list(shape)}) ends at byte {end}, "
                f"the file has {len(self._map)}"
            )
        return TensorInfo(name, shape, kind, start, end)

    def _refuse_overlaps(self) -> None:
        filled = [info for info in self.tensors.values() if info.start < info.end]
        filled.sort(key=lambda info: info.start)
        for before, after in pairwise(filled):
            if after.start < before.end:
                self._fail(
                    f"tensor {quote(after.name)} starts at byte {after.start}, "
                    f"inside {quote(before.name)}, which ends at {before.end}"
                )

    def _fail(self, problem: str) -> NoReturn:
        raise GgufError(f"{self.path}: {problem}")


class _Header:
    """A position in the mapping that never leaves it, and what the specification puts there."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.position = 0
        self._data = data
        self._path = path
        self._values_left = _MAX_VALUES

    def version(self) -> int:
        found = self._data[self._take(len(MAGIC), "magic") : self.position]
        if found != MAGIC:
            self._fail(f"not a GGUF file: starts with {found!r}, not {MAGIC!r}")
        version = self._u32("version")
        # Big-endian files are told by their version: the specification gives them no mark.
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            self._fail("big-endian; only little-endian files can be read")
        if version not in VERSIONS:
            self._fail(f"GGUF version {version}, only {VERSIONS[0]} and {VERSIONS[1]} can be read")
        return version

    def count(self, what: str, limit: int, min_bytes: int) -> int:
        count = self._u64(f"number of {what}")
        if count > limit:
            self._fail(f"{count} {what}, at most {limit} are read")
        if count * min_bytes > len(self._data) - self.position:
            self._fail(
                f"{count} {what} need at least {count * min_bytes} bytes, "
                f"{len(self._data) - self.position} are left in the file"
            )
        return count

    def metadata(self, count: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for index in range(count):
            key = self._string(f"metadata key {index}", MAX_KEY_BYTES)
            if key in found:
                self._fail(f"metadata key {quote(key)} appears twice")
            what = f"metadata key {quote(key)}"
            found[key] = self._value(self._value_type(what), what, 0)
        return found

    def tensor_infos(self, count: int) -> dict[str, tuple[tuple[int, ...], TensorType, int]]:
        """Name -> shape in PyTorch's order, type, offset from the start of the tensor data."""
        found: dict[str, tuple[tuple[int, ...], TensorType, int]] = {}
        for index in range(count):
            # The specification's 64 bytes for a name are exceeded by files in use: the limit is
            # that of a key.
            name = self._string(f"name of tensor {index}", MAX_KEY_BYTES)
            if name in found:
                self._fail(f"tensor {quote(name)} appears twice")
            what = f"tensor {quote(name)}"
            num_dims = self._u32(what)
            if num_dims > MAX_DIMS:
                self._fail(f"{what} has {num_dims} dimensions, at most {MAX_DIMS} are allowed")
            # Fastest first in the file. A 0 must not hide the overflow of the other dimensions.
            shape = tuple(self._u64(what) for _ in range(num_dims))[::-1]
            if prod(max(size, 1) for size in shape) >= 1 << 63:
                self._fail(f"{what} has {list(shape)} values, more than 2**63 - 1")
            code = self._u32(what)
            try:
                kind = TensorType(code)
            except ValueError:
                self._fail(f"{what} has the unknown type {code}")
            found[name] = (shape, kind, self._u64(what))
        return found

    def _value_type(self, what: str) -> ValueType:
        code = self._u32(what)
        try:
            return ValueType(code)
        except ValueError:
            self._fail(f"{what} has the unknown type {code}")

    def _value(self, kind: ValueType, what: str, depth: int) -> Value:
        if kind == ValueType.STRING:
            return self._string(what, _MAX_STRING_BYTES)
        if kind == ValueType.ARRAY:
            return self._array(what, depth + 1)
        if kind == ValueType.BOOL:
            flag = self._data[self._take(1, what)]
            if flag > 1:
                self._fail(f"{what} is a bool of value {flag}")
            return flag == 1
        scalar = _SCALARS[kind]
        value: int | float = scalar.unpack_from(self._data, self._take(scalar.size, what))[0]
        return value

    def _array(self, what: str, depth: int) -> Value:
        if depth > _MAX_NESTING:
            self._fail(f"{what} nests arrays deeper than {_MAX_NESTING}")
        kind = self._value_type(what)
        count = self._u64(what)
        if count > self._values_left:
            self._fail(
                f"{what} is an array of {count}, at most {_MAX_VALUES} values are read in all"
            )
        self._values_left -= count
        if kind in NUMBERS or kind == ValueType.BOOL:
            dtype = np.dtype("<" + NUMBERS.get(kind, "B"))
            start = self._take(count * dtype.itemsize, what)
            # Copied: it may be unaligned, and should not keep the file open.
            numbers = np.frombuffer(self._data, dtype, count, start).copy()
            if kind == ValueType.BOOL:
                if (numbers > 1).any():
                    self._fail(f"{what} has a bool of value {numbers.max()}")
                return numbers.view(np.bool_)
            return numbers
        # Each element has a length of 8 bytes at least.
        if count * 8 > len(self._data) - self.position:
            self._fail(
                f"{what} is an array of {count}, {len(self._data) - self.position} bytes are left"
            )
        return [self._value(kind, what, depth) for _ in range(count)]

    def _string(self, what: str, limit: int) -> str:
        size = self._u64(what)
        if size > limit:
            self._fail(f"{what} has {size} bytes, at most {limit} are read")
        start = self._take(size, what)
        try:
            return self._data[start : start + size].decode()
        except UnicodeDecodeError as error:
            self._fail(f"{what} is not UTF-8: {error.reason} at byte {start + error.start}")

    def _u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self._data, self._take(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self._data, self._take(8, what))[0]
        return value

    def _take(self, size: int, what: str) -> int:
        """Where the next `size` bytes start; the position moves past them."""
        start = self.position
        if size > len(self._data) - start:
            self._fail(
                f"{what}: {size} bytes are needed at byte {start}, the file has {len(self._data)}"
            )
        self.position = start + size
        return start

    def _fail(self, problem: str) -> NoReturn:
        raise GgufError(f"{self._path}: {problem}")
