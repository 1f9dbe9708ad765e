"""Checkpoint: a folder of safetensors files, read tensor by tensor and trusted in nothing.

The files may come from anywhere. What a header or an index says is checked before use, every error
names file, tensor, what was found and what is needed, and nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = ("F16", "BF16", "F32")
"""The dtypes that scales, biases and unquantised weights may have, as safetensors spells them."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""As safetensors spells them. Those of less than a byte are not read."""

# A config takes kilobytes, and the index of the largest models some megabytes.
_MAX_JSON_BYTES = 100 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that is damaged, contradicts itself, or is not what it says it is."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor, after safetensors has checked it.

    Attributes:
        file: that it is in.
        dtype: as safetensors spells it.
        shape: in PyTorch's order.
        start, end: byte range in the file; ``end - start`` is what shape and dtype need.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of ``model.safetensors``, of the shards of an index, or of the only such file.

    Args:
        folder: the checkpoint's folder.
        files: take these files, whatever their names, and no index.

    Attributes:
        folder: the checkpoint's folder.
        tensors: what the headers say, by tensor name. Only headers are read for it.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no safetensors file.
        CheckpointError: a damaged header or index, a file outside of the folder, or a tensor that
            is twice in the headers, or in the index and not in its file.
    """

    def __init__(self, folder: str | Path, files: Iterable[str | Path] | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"effllm: no checkpoint folder {self.folder}")
        index = self._index_path() if files is None else None
        weight_map = {} if index is None else _weight_map(index)
        if files is None:
            names = sorted(set(weight_map.values())) if index else [self._single_name()]
            files = [self.folder / name for name in names]
        self.tensors: dict[str, TensorInfo] = {}
        self._opened: dict[Path, tuple[int, ...]] = {}
        self._in_memory: Mapping[str, Tensor] = {}
        for file in files:
            self._add_file(Path(file))
        for tensor, name in weight_map.items():
            info = self.tensors.get(tensor)
            if info is None or info.file.name != name:
                found = "no such tensor" if info is None else f"it in {info.file.name}"
                raise CheckpointError(f"{index}: '{tensor}' must be in {name}, found {found}")

    def read(
        self,
        name: str,
        shape: Sequence[int] | None = None,
        dtypes: Iterable[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """One tensor on ``device``; CheckpointError if it is missing or not what is needed."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: tensor '{name}' is missing")
        wrong_shape = shape is not None and tuple(shape) != info.shape
        if wrong_shape or (dtypes is not None and info.dtype not in dtypes):
            kinds = " or ".join(dtypes) if dtypes is not None else info.dtype
            needed = list(info.shape if shape is None else shape)
            raise CheckpointError(
                f"{info.file}: tensor '{name}' must be {kinds} {needed}, "
                f"got {info.dtype} {list(info.shape)}"
            )
        if name in self._in_memory:
            return self._in_memory[name].to(device, copy=True)
        return self._stored(name, info).to(device)

    def read_finite(
        self, name: str, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """A float tensor that must hold neither NaN nor infinity, as scales."""
        tensor = self.read(name, shape, FLOATS, device)
        if not bool(torch.isfinite(tensor).all()):
            file = self.tensors[name].file
            raise CheckpointError(f"{file}: tensor '{name}' must be finite, got NaN or infinity")
        return tensor

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """The same checkpoint, of which somebody else has read these tensors already.

        One that has been cast since it was read from its file is read again.
        """
        view = copy.copy(self)
        view._in_memory = {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.dtype == TORCH_DTYPES.get(self.tensors[name].dtype)
        }
        return view

    def _stored(self, name: str, info: TensorInfo) -> Tensor:
        """Read into memory of its own. A mapped file would crash the process if somebody shortened
        it, follow what somebody writes to it, and count as memory in use, all of it at the end."""
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{info.file}: tensor '{name}' has dtype {info.dtype}")
        data = torch.empty(info.end - info.start, dtype=torch.uint8, device="cpu")
        try:
            with info.file.open("rb") as file:
                if _stamp(file) != self._opened[info.file]:
                    raise CheckpointError(f"{info.file}: the file has changed since it was opened")
                file.seek(info.start)
                count = file.readinto(data.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{info.file}: tensor '{name}': {error}") from error
        if count != data.numel():
            raise CheckpointError(
                f"{info.file}: tensor '{name}' needs {data.numel()} bytes, got {count}"
            )
        return data.view(dtype).view(info.shape)

    def _index_path(self) -> Path | None:
        # As transformers chooses: the single file before the index.
        if (self.folder / "model.safetensors").exists():
            return None
        indices = sorted(self.folder.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            names = ", ".join(path.name for path in indices)
            raise CheckpointError(f"{self.folder}: one index is needed, found {names}")
        return indices[0] if indices else None

    def _single_name(self) -> str:
        if (self.folder / "model.safetensors").exists():
            return "model.safetensors"
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise FileNotFoundError(f"effllm: {self.folder} holds no safetensors file")
        if len(names) > 1:
            raise CheckpointError(
                f"{self.folder}: several files need a model.safetensors.index.json, "
                f"found {', '.join(names)}"
            )
        return names[0]

    def _add_file(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing")
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: (str(p.get_dtype()), p.get_shape()) for name, p in parts.items()}
            with path.open("rb") as raw:
                stamp = _stamp(raw)
                header, start = _read_header(path, raw)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        for name, (dtype, shape) in found.items():
            if name in self.tensors:
                other = self.tensors[name].file
                raise CheckpointError(f"{path}: tensor '{name}' is also in {other}")
            begin, end = header[name]["data_offsets"]
            self.tensors[name] = TensorInfo(path, dtype, tuple(shape), start + begin, start + end)
        self._opened[path] = stamp


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file; CheckpointError names the file and what is wrong."""
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: must be at most {_MAX_JSON_BYTES} bytes, got {size}")
    return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{path}: key '{twice}' is there twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also wrong UTF-8
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index; only plain names of files beside it are let through."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "nothing" if not weight_map else type(weight_map).__name__
        raise CheckpointError(f"{index}: weight_map must map tensors to files, got {found}")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors")
        # Separators of all systems: an index may have been made for another one.
        if not plain or any(char in name for char in "/\\:\0"):
            raise CheckpointError(
                f"{index}: '{tensor}' must be in a .safetensors file of this folder, got {name!r}"
            )
    return weight_map


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a file that safetensors has accepted, and where its data starts.

    safetensors keeps the last of two entries with one name, and says nothing.
    """
    length = int.from_bytes(file.read(8), "little")
    return _parse_json(path, file.read(length)), 8 + length


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    """Another one for another file of that name, and for one that has been written to."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
