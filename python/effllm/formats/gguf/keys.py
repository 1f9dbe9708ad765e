"""Keys: metadata values that are of the type they must be, or one error that names file and key."""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np

from effllm.formats.gguf.reader import GgufFile
from effllm.formats.gguf.spec import GgufError, quote


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class Keys:
    """Metadata of a file, under one prefix: that of the architecture, or of the tokenizer.

    All methods raise GgufError for a value of the wrong type or range, and for a missing one that
    has no default.
    """

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix

    def name(self, key: str) -> str:
        """The whole key: ``llama.block_count`` for ``block_count``."""
        return f"{self._prefix}.{key}"

    def has(self, key: str) -> bool:
        """Whether the file has a value."""
        return self.name(key) in self._file.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer of at most 31 bits."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            self.fail(f"'{self.name(key)}' must be a positive integer, got {quote(str(value))}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite float; see ``shortest``."""
        value = self._get(key, default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            self.fail(f"'{self.name(key)}' must be a positive float, got {quote(str(value))}")
        return shortest(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self.fail(f"'{self.name(key)}' must be a string, got {quote(str(value))}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(f"'{self.name(key)}' must be a bool, got {quote(str(value))}")
        return value

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        value = self._get(key, None)
        if isinstance(value, np.ndarray) and not len(value):
            return []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self.fail(f"'{self.name(key)}' must be an array of strings")
        return [text for text in value if isinstance(text, str)]

    def numbers(self, key: str, count: int, kind: str) -> np.ndarray:
        """An array of ``count`` finite numbers of the numpy kind "i" (or unsigned) or "f"."""
        value = self._get(key, None)
        kinds = {"i": "iu", "f": "fiu"}[kind]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            self.fail(f"'{self.name(key)}' must be an array of numbers")
        if len(value) != count:
            self.fail(f"'{self.name(key)}' must have {count} values, got {len(value)}")
        if not np.isfinite(value).all():
            self.fail(f"'{self.name(key)}' has values that are not finite")
        return value

    def fail(self, problem: str) -> NoReturn:
        """Raises."""
        raise GgufError(f"{self._file.path}: {problem}")

    def _get(self, key: str, default: object) -> object:
        value: object = self._file.metadata.get(self.name(key), default)
        if value is None:
            self.fail(f"metadata key '{self.name(key)}' is missing")
        return value
