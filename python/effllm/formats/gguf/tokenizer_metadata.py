"""tokenizer_metadata: the keys of a GGUF file for a tokenizer of transformers."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from effllm.formats.gguf.spec import GgufError, quote
from effllm.formats.gguf.tokenizer_rules import (
    PREFIX,
    SPACE,
    SPLITTINGS,
    Splitting,
    TokenType,
    merges_of_scores,
    prefix_space,
)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """What ``write_model`` needs as ``metadata`` for the file to hold a tokenizer.

    Byte-level BPE that splits text as one of the ``tokenizer.ggml.pre`` that ``read_tokenizer``
    knows, and SentencePiece BPE, stored as "llama". What has no key is lost, as in all GGUF files:
    whether an added token takes the spaces beside it, and, with SentencePiece, what is not Llama's:
    a space in front of every text, of one that starts with a space and of one that follows a
    special token too.

    Args:
        tokenizer: fast, of transformers.
        vocab_size: of the model. Ids that the tokenizer has no token for become unused tokens.

    Raises:
        GgufError: the tokenizer is none of these, is larger than the vocabulary, or has merges that
            do not follow from scores.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GgufError(f"a fast tokenizer is needed, got a {type(tokenizer).__name__}")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
        raise GgufError(f"only BPE tokenizers can be stored, got {model['type']}")
    tokens, types = _vocabulary(parts, vocab_size)
    merges = [tuple(m) if isinstance(m, list) else _pair(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        unknown = model.get("unk_token") or getattr(tokenizer, "unk_token", None)
        metadata = _sentencepiece(parts, tokens, types, merges, unknown)
    else:
        metadata = _byte_level(parts, merges)
    metadata |= {"tokens": tokens, "token_type": np.array(types, np.int32)}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = getattr(tokenizer, f"{role}_token_id", None)
        if token is not None:
            metadata[f"{name}_token_id"] = token
    metadata |= _added_at_ends(tokenizer)
    return {f"{PREFIX}.{key}": value for key, value in metadata.items()} | _templates(tokenizer)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _vocabulary(parts: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types."""
    found = {i: (token, TokenType.NORMAL) for token, i in parts["model"]["vocab"].items()}
    for added in parts["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found, default=0) >= vocab_size:
        raise GgufError(
            f"token {max(found)} of the tokenizer is beyond the vocabulary of {vocab_size}"
        )
    entries = [found.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    return [token for token, _ in entries], [kind for _, kind in entries]


def _byte_level(parts: dict[str, Any], merges: list[tuple[str, str]]) -> dict[str, Any]:
    splitting = _splitting(parts)
    if splitting is None:
        known = ", ".join(splitting.names[0] for splitting in SPLITTINGS)
        raise GgufError(
            f"the tokenizer splits or normalises text as none of {known}, which can be stored: "
            f"{quote(json.dumps(parts['pre_tokenizer']))}"
        )
    spaced = next((m for m in merges if " " in m[0] or " " in m[1]), None)
    if spaced is not None:
        raise GgufError(f"the merge {spaced} has a space, which cannot be stored")
    # An empty list has no type.
    pairs = [f"{left} {right}" for left, right in merges] or np.array([], np.int32)
    return {"model": "gpt2", "pre": splitting.names[0], "merges": pairs}


def _splitting(parts: dict[str, Any]) -> Splitting | None:
    """Which of those that have names does just what the tokenizer does."""
    steps = _steps(parts["pre_tokenizer"])
    normalizer = parts["normalizer"]
    ignore_merges = bool(parts["model"].get("ignore_merges"))
    for splitting in SPLITTINGS:
        same = (splitting.ignore_merges, splitting.normalizer()) == (ignore_merges, normalizer)
        if same and _steps(splitting.pre_tokenizer()) == steps:
            return splitting
    return None


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps, without what changes offsets alone."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]


def _sentencepiece(
    parts: dict[str, Any],
    tokens: list[str],
    types: list[int],
    merges: list[tuple[str, str]],
    unknown: str | None,
) -> dict[str, Any]:
    spaces = [prefix_space(parts[name]) for name in ("normalizer", "pre_tokenizer") if parts[name]]
    if len(spaces) != 1 or spaces[0] is None:
        raise GgufError("the tokenizer treats spaces in a way that cannot be stored")
    for i, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            types[i] = TokenType.BYTE
        elif token == unknown:
            types[i] = TokenType.UNKNOWN
        elif types[i] == TokenType.USER_DEFINED:
            tokens[i] = token.replace(SPACE, " ")
    return {
        "model": "llama",
        "pre": "default",
        "scores": _scores(tokens, types, merges),
        "add_space_prefix": spaces[0],
    }


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> np.ndarray:
    """The score of a token is its place in the order of merges, downwards from 0.

    Special tokens are found before anything is merged, so their merges mean nothing.
    """
    kinds = dict(zip(tokens, types, strict=True))
    normal = {token for token, kind in kinds.items() if kind == TokenType.NORMAL}
    parts = normal | {token for token, kind in kinds.items() if kind == TokenType.USER_DEFINED}
    merges = [merge for merge in merges if "".join(merge) in normal and parts.issuperset(merge)]
    order: dict[str, int] = {}
    last = None
    for merge in merges:
        token = "".join(merge)
        if token != last and token in order:
            raise GgufError(f"merges do not follow from scores: those of {quote(token)} are apart")
        last = token
        order.setdefault(token, len(order))
    scores = [-float(order.get(token, len(order))) for token in tokens]
    implied = [m for m in merges_of_scores(tokens, scores, types) if "".join(m) in normal]
    if set(implied) != set(merges):
        (first, *_) = set(implied) ^ set(merges)
        raise GgufError(f"merges do not follow from scores, such as {first}")
    return np.array(scores, np.float32)


def _added_at_ends(tokenizer: Any) -> dict[str, bool]:
    """Whether begin and end tokens are added, as the tokenizer does with a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            after = [tokenizer.eos_token_id] if eos else []
            if whole == before + plain + after:
                return {"add_bos_token": bos, "add_eos_token": eos}
    raise GgufError(f"the tokenizer adds more than begin and end tokens to a text: {whole}")


def _templates(tokenizer: Any) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, dict):
        return {} if template is None else {"tokenizer.chat_template": template}
    return {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text
        for name, text in template.items()
    }
