"""Tokenizer and token ids of the demo models, built once from the corpus and cached."""

from __future__ import annotations

import json
import platform
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if __package__:
    from .corpus import END_OF_TEXT, held_out_text, held_out_tokens, training_corpus
else:
    from corpus import (  # type: ignore[import-not-found,no-redef]
        END_OF_TEXT,
        held_out_text,
        held_out_tokens,
        training_corpus,
    )

CONTEXT = 2048
VOCABULARY = 4096
PADDING = "<|pad|>"


@dataclass
class Data:
    """Token ids: `train` int64 [tokens]; `validation` and `held_out` int64 [windows, CONTEXT]."""

    train: torch.Tensor
    validation: torch.Tensor
    held_out: torch.Tensor


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of `VOCABULARY` entries; decoding restores every input byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: the class name that transformers 5 would write is unknown to older versions.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def prepare(stdlib: str | None, cache: Path) -> tuple[Data, dict[str, Any]]:
    """Builds corpus, tokenizer and token ids, or reads them back from `cache`."""
    tokens_path, description_path = cache / "tokens.npz", cache / "corpus.json"
    if not tokens_path.exists():
        corpus = training_corpus(stdlib)
        texts = list(corpus.files.values())
        tokenizer = train_tokenizer(texts)
        end = tokenizer.token_to_id(END_OF_TEXT)
        parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
        for name, encoded in zip(corpus.files, tokenizer.encode_batch(texts), strict=True):
            # About one file in 32 validates: it chooses the dropout, held-out text only judges.
            is_validation = zlib.crc32(name.encode()) % 32 == 0
            parts[is_validation].append(np.array([*encoded.ids, end], np.uint16))
        held_out = held_out_tokens(tokenizer, context=CONTEXT, directory=stdlib)
        save_tokenizer(tokenizer, cache)
        train, validation = np.concatenate(parts[False]), np.concatenate(parts[True])
        description = corpus.description() | {
            "python": platform.python_version(),
            "training_tokens": int(train.size),
            "validation_tokens": int(validation.size),
            "held_out_tokens": held_out.numel(),
            # To compare perplexities across tokenizers.
            "held_out_bytes_per_token": len(held_out_text(stdlib).encode())
            / len(tokenizer.encode(held_out_text(stdlib)).ids),
        }
        np.savez_compressed(
            tokens_path,
            train=train,
            validation=validation[: validation.size // CONTEXT * CONTEXT],
            held_out=held_out.numpy().astype(np.uint16),
        )
        description_path.write_text(json.dumps(description, indent=2) + "\n")
    arrays = {
        name: torch.from_numpy(array.astype(np.int64))
        for name, array in np.load(tokens_path).items()
    }
    arrays["validation"] = arrays["validation"].view(-1, CONTEXT)
    return Data(**arrays), json.loads(description_path.read_text())
