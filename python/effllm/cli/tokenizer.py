"""The tokenizer of a checkpoint, and the tokens of a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.formats import gguf
from effllm.formats.empty import import_extra
from effllm.formats.gguf_model import is_gguf

# What a checkpoint has beside config and weights.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


def read_tokenizer(source: Path) -> Any:
    """That of a folder or .gguf file, None if there is none."""
    if is_gguf(source):
        file = gguf.GgufFile(source)
        return gguf.read_tokenizer(file) if "tokenizer.ggml.model" in file.metadata else None
    if not any(path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        return None
    return import_extra("transformers").AutoTokenizer.from_pretrained(source)


def read_tokens(tokenizer: Any, path: Path) -> Tensor:
    """int64 ``[T]``: the tokens of a UTF-8 text file, without special ones.

    Raises ValueError if there are less than two.
    """
    text = path.read_text("utf-8")
    # Not verbose: tokenizers warn of texts that are longer than the model's context.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if ids.numel() < 2:
        raise ValueError(f"{path} must hold at least two tokens, got {ids.numel()}")
    return ids.long()
