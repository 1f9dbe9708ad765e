"""ShardWriter: safetensors files out of tensors that come one after the other.

The package's own writer takes all tensors of a file at once, which for a whole model means another
copy of it in memory. The layout is simple: the header's length in 8 bytes, the header as JSON, the
data without gaps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.formats.checkpoint import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_COPY_BYTES = 1 << 20


class ShardWriter:
    """Writes ``model.safetensors``, or numbered files and their index, into a folder.

    The header says where all data is, so it can only be written last. Until then the data waits in
    files beside, one per size of an element: larger elements come first, as the package has it, so
    that each tensor is aligned.

    Args:
        folder: exists, and is not used by others.
        max_bytes: start another file rather than exceed it, except by a single ``add``.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._files: list[tuple[Path, list[str]]] = []
        self._total = 0
        self._start()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Appends tensors, of any device, that must be in one file together."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._entries and self._size + size > self._max_bytes:
            self._flush()
        for name, tensor in tensors.items():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            item = tensor.element_size()
            with self._waiting(item).open("ab") as file:
                start = file.tell()
                file.write(data.numpy().data)
            self._entries[name] = (item, tensor.dtype, list(tensor.shape), start, start + len(data))
        self._size += size
        self._total += size

    def finish(self) -> None:
        """Gives the files their names, and writes the index if there are several."""
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for i, (file, names) in enumerate(self._files):
            name = f"model-{i + 1:05}-of-{len(self._files):05}.safetensors"
            file.rename(self._folder / name)
            weight_map.update(dict.fromkeys(names, name))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")

    def _start(self) -> None:
        """Of each tensor: size of an element, dtype, shape, byte range in its waiting file."""
        self._entries: dict[str, tuple[int, torch.dtype, list[int], int, int]] = {}
        self._size = 0

    def _waiting(self, item: int) -> Path:
        return self._folder / f"{item}.waiting"

    def _flush(self) -> None:
        items = sorted({item for item, *_ in self._entries.values()}, reverse=True)
        offsets, offset = {}, 0
        for item in items:
            offsets[item] = offset
            offset += self._waiting(item).stat().st_size
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (item, dtype, shape, start, end) in self._entries.items():
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": shape,
                "data_offsets": [offsets[item] + start, offsets[item] + end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = self._folder / f"{len(self._files)}.part"
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for item in items:
                with self._waiting(item).open("rb") as data:
                    shutil.copyfileobj(data, file, _COPY_BYTES)
                self._waiting(item).unlink()
        self._files.append((path, list(self._entries)))
        self._start()
