"""read_tokenizer: the tokenizer that a GGUF file describes, as transformers has it."""

from __future__ import annotations

import json
from typing import Any

from effllm.formats.empty import import_extra
from effllm.formats.gguf.config import TOKENS, token_id
from effllm.formats.gguf.keys import Keys
from effllm.formats.gguf.reader import GgufFile
from effllm.formats.gguf.spec import GgufError, quote
from effllm.formats.gguf.tokenizer_rules import (
    PREFIX,
    SPACE,
    SPLITTINGS,
    Splitting,
    TokenType,
    byte_level,
    merges_of_scores,
)

# role in transformers -> name in the file, and the id that llama.cpp takes for a SentencePiece
# vocabulary whose file does not say
_ROLES = {
    "bos_token": ("bos", 1),
    "eos_token": ("eos", 2),
    "unk_token": ("unknown", 0),
    "pad_token": ("padding", None),
}
_TEMPLATE = "tokenizer.chat_template"


def read_tokenizer(file: GgufFile) -> Any:
    """The tokenizer in a file: a ``transformers.PreTrainedTokenizerFast``.

    Reads ``tokenizer.ggml.model`` "llama" (SentencePiece BPE: tokens with scores, unknown
    characters as bytes) and "gpt2" (byte-level BPE with merges), the latter with a
    ``tokenizer.ggml.pre`` of gpt-2, smollm, starcoder, refact, llama-bpe, qwen2, deepseek-r1-qwen
    or tekken. Control tokens become special tokens, user-defined ones are taken whole; begin and
    end tokens are added as the file says, or else as llama.cpp does. The chat template is that of
    the file, and so are its named ones.

    Token ids are those of llama.cpp, but for qwen2 of text that is not in normal form (NFC), which
    the model's own tokenizer composes first.

    Raises:
        GgufError: there is no tokenizer, it is of another kind, or its keys contradict one another;
            the message names the key.
        ImportError: transformers is missing.

    Source: llama.cpp, src/llama-vocab.cpp.
    """
    keys = Keys(file, PREFIX)
    model = keys.text("model")
    if model not in ("llama", "gpt2"):
        keys.fail(f"'{PREFIX}.model' is {quote(model)}, only 'llama' and 'gpt2' can be read")
    tokens = _tokens(keys)
    types = _types(keys, len(tokens))
    roles = _roles(file, tokens, sentencepiece=model == "llama")
    if model == "llama":
        parts = _sentencepiece(keys, tokens, types, roles)
    else:
        parts = _byte_level(keys, tokens, roles)
    parts |= {"version": "1.0", "added_tokens": _added_tokens(tokens, types)}
    try:
        backend = import_extra("tokenizers").Tokenizer.from_str(
            json.dumps(parts, ensure_ascii=False)
        )
    except Exception as error:  # the package has no narrower type
        raise GgufError(f"{file.path}: not a tokenizer: {error}") from error
    tokenizer = import_extra("transformers").PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{role: tokens[token] for role, token in roles.items() if token is not None},
    )
    template = _chat_template(file, keys)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _tokens(keys: Keys) -> list[str]:
    tokens = keys.texts("tokens")
    if not tokens:
        keys.fail(f"'{TOKENS}' is empty")
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            keys.fail(f"'{TOKENS}' has {quote(token)} twice")
        seen.add(token)
    return tokens


def _types(keys: Keys, count: int) -> list[int]:
    if not keys.has("token_type"):
        return [TokenType.NORMAL] * count
    types: list[int] = keys.numbers("token_type", count, "i").tolist()
    return types


def _roles(file: GgufFile, tokens: list[str], sentencepiece: bool) -> dict[str, int | None]:
    roles: dict[str, int | None] = {}
    for role, (name, default) in _ROLES.items():
        roles[role] = token_id(file, name, len(tokens))
        said = f"{PREFIX}.{name}_token_id" in file.metadata
        if sentencepiece and not said and default is not None and default < len(tokens):
            roles[role] = default
    return roles


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Those that are found in a text before anything else is done to it."""
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # Spaces of a text are not spelled so until it is normalised.
            "normalized": types[i] == TokenType.USER_DEFINED and SPACE in token,
            "special": types[i] != TokenType.USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if token and types[i] in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    ]


def _byte_level(keys: Keys, tokens: list[str], roles: dict[str, int | None]) -> dict[str, Any]:
    splitting = _splitting(keys)
    return {
        "normalizer": splitting.normalizer(),
        "pre_tokenizer": splitting.pre_tokenizer(),
        "post_processor": _post_processor(keys, tokens, roles, splitting.add_bos),
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "ignore_merges": splitting.ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(keys, set(tokens) - {""}),
        },
    }


def _splitting(keys: Keys) -> Splitting:
    name = keys.text("pre")
    for splitting in SPLITTINGS:
        if name in splitting.names:
            return splitting
    known = ", ".join(name for splitting in SPLITTINGS for name in splitting.names)
    keys.fail(f"'{PREFIX}.pre' is {quote(name)}, only {known} can be read")


def _merges(keys: Keys, tokens: set[str]) -> list[tuple[str, str]]:
    """Pairs of tokens that make another: what is none, the package tokenizers cannot take."""
    pairs = []
    for merge in keys.texts("merges"):
        left, _, right = merge.partition(" ")
        for token in (left, right, left + right):
            if token not in tokens:
                keys.fail(f"'{PREFIX}.merges' has {quote(merge)}, but {quote(token)} is no token")
        pairs.append((left, right))
    return pairs


def _sentencepiece(
    keys: Keys, tokens: list[str], types: list[int], roles: dict[str, int | None]
) -> dict[str, Any]:
    scores: list[float] = keys.numbers("scores", len(tokens), "f").tolist()
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if keys.flag("add_space_prefix", True):
        spaces = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces],
        }
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    try:
        merges = merges_of_scores(tokens, scores, types)
    except GgufError as error:
        keys.fail(f"'{TOKENS}': {error}")
    unknown = roles["unk_token"]
    return {
        "normalizer": spaces,
        "pre_tokenizer": None,
        "post_processor": _post_processor(keys, tokens, roles, True),
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _post_processor(
    keys: Keys, tokens: list[str], roles: dict[str, int | None], add_bos: bool
) -> dict[str, Any] | None:
    """Adds the begin and end tokens, to each of two texts."""
    before = roles["bos_token"] if keys.flag("add_bos_token", add_bos) else None
    after = roles["eos_token"] if keys.flag("add_eos_token", False) else None
    if before is None and after is None:
        return None

    def template(name: str, type_id: int) -> list[dict[str, Any]]:
        around = [
            [] if i is None else [{"SpecialToken": {"id": tokens[i], "type_id": type_id}}]
            for i in (before, after)
        ]
        return [*around[0], {"Sequence": {"id": name, "type_id": type_id}}, *around[1]]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
            for i in (before, after)
            if i is not None
        },
    }


def _chat_template(file: GgufFile, keys: Keys) -> str | dict[str, str] | None:
    """One template, or several by name if the file has such; that of the first key is "default"."""
    found = {}
    for key, value in file.metadata.items():
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            if not isinstance(value, str):
                keys.fail(f"'{key}' must be a string")
            found[key.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = value
    return found.get("default") if found.keys() <= {"default"} else found
