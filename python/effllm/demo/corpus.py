"""Text of the demo models: Python sources of the standard library of the running Python.

No foreign text ships with the package. Training files and held-out files are both read from an
installed Python, so the split has to be a rule rather than a list of files: the modules in
`HELD_OUT` (and their own tests) never enter training, and a training file that repeats long
passages of a held-out module is dropped as well.

This file needs no part of effllm, so that the training script runs before the package is built.
"""

from __future__ import annotations

import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

END_OF_TEXT = "<|endoftext|>"

# Single-file modules, present from Python 3.11 to 3.14 and kept by stripped distributions: maths,
# containers, text, file formats, mail, networking, code generation. About 500 KB together.
HELD_OUT = (
    "calendar",
    "configparser",
    "csv",
    "dataclasses",
    "fractions",
    "gettext",
    "graphlib",
    "heapq",
    "mailbox",
    "pprint",
    "queue",
    "selectors",
    "shlex",
    "socketserver",
    "statistics",
    "tempfile",
    "textwrap",
)

# Code page and property tables, a generated help text, and parser test data with odd encodings:
# nothing a small language model should spend capacity on.
_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
}
_SKIPPED_PREFIXES = ("lib2to3/tests/data/", "config-", "_sysconfigdata")

# A shingle is a run of lexical tokens; 50 tokens are about five lines of code. Shorter runs are
# shared by unrelated code (import blocks, `__all__`, `unittest` boilerplate).
SHINGLE = 50
# A training file may share a stray boilerplate passage, not pages.
MAX_SHARED_SHINGLES = 20

_LEXEME = re.compile(r"\w+|[^\w\s]")


def stdlib_directory() -> Path:
    """Folder of the standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def held_out_files(directory: str | Path | None = None) -> dict[str, str]:
    """Held-out sources as {module name: text}, in a fixed order.

    `directory` is a standard library folder, by default that of the running Python. A module that
    a stripped distribution lacks is left out; `FileNotFoundError` if none is there.
    """
    root = Path(directory) if directory is not None else stdlib_directory()
    files = {}
    for name in HELD_OUT:
        path = root / f"{name}.py"
        if path.is_file():
            files[name] = path.read_text(encoding="utf-8")
    if not files:
        raise FileNotFoundError(
            f"effllm.demo: held-out text needs the sources of {', '.join(HELD_OUT)} in {root}, "
            "found none of them; name a standard library folder with .py files"
        )
    return files


def held_out_text(directory: str | Path | None = None) -> str:
    """All held-out sources as one string, an end-of-text marker after each file."""
    return "".join(text + END_OF_TEXT for text in held_out_files(directory).values())


def held_out_tokens(
    tokenizer: Any,
    *,
    context: int = 2048,
    limit: int | None = None,
    directory: str | Path | None = None,
) -> torch.Tensor:
    """Held-out text as evaluation windows: int64 [windows, context], not overlapping.

    `tokenizer` is a `transformers` tokenizer or a `tokenizers.Tokenizer` of the demo models.
    `limit` bounds the number of tokens: evenly spaced windows are kept, so that a short evaluation
    still sees every kind of module. The end that does not fill a window is left out.
    Raises `ValueError` if the text does not fill one window.
    """
    import torch

    # The tokenizer inside: the transformers wrapper would warn that the text exceeds the context.
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    encoding = backend.encode(held_out_text(directory), add_special_tokens=False)
    ids = torch.tensor(encoding.ids, dtype=torch.int64)
    windows = ids[: ids.numel() // context * context].view(-1, context)
    if windows.shape[0] == 0:
        raise ValueError(
            f"effllm.demo: held-out text must fill one window of {context} tokens, "
            f"got {ids.numel()}"
        )
    if limit is not None:
        keep = min(max(limit // context, 1), windows.shape[0])
        windows = windows[torch.arange(keep) * windows.shape[0] // keep]
    return windows


@dataclass
class TrainingCorpus:
    """Training files and what was done to obtain them (counts and names of dropped files)."""

    files: dict[str, str] = field(default_factory=dict)
    held_out_related: list[str] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    overlapping: dict[str, int] = field(default_factory=dict)
    shared_shingles_kept: int = 0
    held_out_shingles: int = 0

    def description(self) -> dict[str, Any]:
        """Numbers for the training record."""
        return {
            "files": len(self.files),
            "characters": sum(map(len, self.files.values())),
            "held_out_modules": list(HELD_OUT),
            "excluded_held_out_related": self.held_out_related,
            "excluded_undecodable": len(self.undecodable),
            "excluded_tables": len(self.tables),
            "excluded_duplicates": len(self.duplicates),
            "excluded_overlapping": self.overlapping,
            "overlap_shingle_tokens": SHINGLE,
            "held_out_shingles": self.held_out_shingles,
            "held_out_shingles_still_in_training": self.shared_shingles_kept,
        }


def training_corpus(
    directory: str | Path | None = None, *, max_shared: int = MAX_SHARED_SHINGLES
) -> TrainingCorpus:
    """Collects the training files of a standard library folder, in a fixed order.

    Left out: held-out modules, their packages and tests; files that are no UTF-8; tables; copies;
    files that share more than `max_shared` shingles with the held-out text.
    """
    root = Path(directory) if directory is not None else stdlib_directory()
    held_out = np.concatenate([shingles(text) for text in held_out_files(root).values()])
    held_out = np.unique(held_out)
    corpus = TrainingCorpus(held_out_shingles=int(held_out.size))
    still_shared: list[np.ndarray] = []
    seen: set[str] = set()
    for name, data in _python_sources(root):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            corpus.undecodable.append(name)
            continue
        if is_held_out_related(name):
            corpus.held_out_related.append(name)
        elif is_table(text):
            corpus.tables.append(name)
        elif text in seen:
            corpus.duplicates.append(name)
        else:
            shared = common(shingles(text), held_out)
            if shared.size > max_shared:
                corpus.overlapping[name] = int(shared.size)
                continue
            still_shared.append(shared)
            seen.add(text)
            corpus.files[name] = text
    if still_shared:
        corpus.shared_shingles_kept = int(np.unique(np.concatenate(still_shared)).size)
    return corpus


def _python_sources(root: Path) -> Iterator[tuple[str, bytes]]:
    for folder, subfolders, files in os.walk(root):
        # Pruned and sorted in place: site-packages can be far larger than the library itself, and
        # the order of the files decides the order of the training tokens.
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_DIRECTORIES)
        for file in sorted(files):
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                yield name, path.read_bytes()


def is_held_out_related(name: str) -> bool:
    """Whether a path relative to the standard library belongs to a held-out module.

    True for the module, a package of that name, and tests of it: they quote its docstrings.
    """
    for part in Path(name).with_suffix("").parts:
        stem = part.removeprefix("_").removeprefix("test_")
        if any(stem == held or stem.startswith(held + "_") for held in HELD_OUT):
            return True
    return False


def is_table(text: str) -> bool:
    """Whether a file is data rather than code or prose: few letters, or many digits."""
    # Bytes beyond ASCII count as neither letter nor digit: tables of foreign characters are tables.
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    dense = int(np.count_nonzero(data > 0x20))
    # Tiny files (empty `__init__.py`) teach nothing but end-of-text.
    if dense < 64:
        return True
    lower = data | 0x20
    letters = np.count_nonzero((lower >= ord("a")) & (lower <= ord("z")))
    digits = np.count_nonzero((data >= ord("0")) & (data <= ord("9")))
    return bool(letters < 0.5 * dense or digits > 0.25 * dense)


def shingles(text: str, length: int = SHINGLE) -> np.ndarray:
    """Sorted unique hashes (uint64) of all runs of `length` lexical tokens of a text.

    Whitespace is ignored, so reindented copies count as copies. A text shorter than `length`
    has none.
    """
    lexemes = _LEXEME.findall(text)
    if len(lexemes) < length:
        return np.empty(0, np.uint64)
    codes = np.fromiter((zlib.crc32(w.encode()) for w in lexemes), np.uint64, len(lexemes))
    hashes = np.zeros(codes.size - length + 1, np.uint64)
    # Polynomial rolling hash modulo 2**64; numpy's unsigned arithmetic wraps by itself.
    for shift in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[shift : shift + hashes.size]
    return np.unique(hashes)


def common(some: np.ndarray, sorted_all: np.ndarray) -> np.ndarray:
    """Elements of `some` that occur in `sorted_all` (ascending), found by binary search."""
    if sorted_all.size == 0:
        return some[:0]
    position = np.minimum(np.searchsorted(sorted_all, some), sorted_all.size - 1)
    return some[sorted_all[position] == some]
