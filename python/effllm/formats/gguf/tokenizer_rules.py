"""What `tokenizer.ggml` keys say in a word or not at all: token types, how byte-level vocabularies
split text, and which merges follow from scores.

Pieces of tokenizers are JSON as in a tokenizer.json, which the package tokenizers reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from effllm.formats.gguf.spec import GgufError

PREFIX = "tokenizer.ggml"
SPACE = "\u2581"  # how SentencePiece spells it

# Tokens of SentencePiece have at most 16 characters by default. All ways to cut one are looked at,
# so that the time and the merges' size grow with its square: both stay far above real vocabularies.
_MAX_TOKEN_CHARACTERS = 256
_MAX_MERGE_CHARACTERS = 1 << 25


class TokenType(IntEnum):
    """Entries of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Splitting:
    """How a byte-level vocabulary splits text before it merges; all of it follows from one name.

    Attributes:
        names: of ``tokenizer.ggml.pre``; the first is written.
        pattern: isolates what it matches; None for that of GPT-2.
        digits: each digit by itself, first.
        nfc: text is normalised so. llama.cpp does not; the models' own tokenizers do.
        ignore_merges: a piece that is a token is taken whole.
        add_bos: the default of ``add_bos_token``.
    """

    names: tuple[str, ...]
    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> dict[str, Any] | None:
        """As JSON."""
        return {"type": "NFC"} if self.nfc else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """As JSON."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern is not None:
            pattern = {"Regex": self.pattern}
            steps.append(
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            )
        steps.append(byte_level(use_regex=self.pattern is None))
        return {"type": "Sequence", "pretokenizers": steps}


def byte_level(use_regex: bool = True) -> dict[str, Any]:
    """The piece that maps bytes to characters and back, with the pattern of GPT-2 or without."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


# Contractions, words, numbers of a limited length, signs, line ends, spaces: the patterns that the
# models were trained with, as their tokenizer.json has them.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
    for number in (r"\p{N}{1,3}", r"\p{N}")
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)

SPLITTINGS = (
    Splitting(("gpt-2",)),
    Splitting(("smollm", "starcoder", "refact"), digits=True),
    Splitting(("llama-bpe", "llama3", "llama-v3"), _LLAMA3, ignore_merges=True, add_bos=True),
    Splitting(("qwen2", "deepseek-r1-qwen"), _QWEN2, nfc=True),
    Splitting(("tekken",), _TEKKEN, ignore_merges=True, add_bos=True),
)
"""Those of the models whose architectures can be read."""


def merges_of_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary, best first.

    SentencePiece joins the two neighbours that make the token of the highest score; merges name the
    neighbours, so each token gives one for every way to cut it into two tokens. Raises GgufError if
    tokens are too long, or the merges too many, for any real vocabulary.
    """
    joinable = (TokenType.NORMAL, TokenType.USER_DEFINED)
    ids = {token: i for i, token in enumerate(tokens) if types[i] in joinable}
    found = []
    size = 0
    for token, i in ids.items():
        if len(token) > _MAX_TOKEN_CHARACTERS:
            raise GgufError(
                f"a token of {len(token)} characters, at most {_MAX_TOKEN_CHARACTERS} are read"
            )
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
                size += len(token)
        if size > _MAX_MERGE_CHARACTERS:
            raise GgufError(f"more than {len(found)} merges follow from the tokens")
    found.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in found]


def prefix_space(text: Mapping[str, Any] | None) -> bool | None:
    """Whether a SentencePiece normalizer, or Metaspace, puts a space in front; None for others."""
    steps = (text or {}).get("normalizers") or [text or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["Metaspace"] and not steps[0].get("split", True):
        return bool(steps[0].get("prepend_scheme", "always") != "never")
    if kinds not in (["Replace"], ["Prepend", "Replace"]):
        return None
    replaces = (steps[-1].get("pattern"), steps[-1].get("content"))
    if replaces != ({"String": " "}, SPACE) or steps[0].get("prepend", SPACE) != SPACE:
        return None
    return len(kinds) == 2
