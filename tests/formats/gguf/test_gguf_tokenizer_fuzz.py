"""Tokenizers and configs from nowhere: whatever the metadata says, there is an error that names the
file, or a tokenizer that works, and a model of the sizes that were promised."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effllm.formats.gguf import (
    GgufError,
    GgufFile,
    TensorType,
    read_state_dict,
    read_tokenizer,
    write_gguf,
    write_model,
)

pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

TEXT = "ab <s>  \u4f60ba\n"
MAX_SECONDS = 5  # machines are shared
no_check = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

LETTERS = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab", "  ", "[PAD]"]
SENTENCEPIECE: dict[str, Any] = {
    "model": "llama",
    "pre": "default",
    "tokens": LETTERS,
    "scores": np.arange(0, -11, -1, np.float32),
    "token_type": np.array([2, 3, 3, 6, 1, 1, 1, 1, 1, 4, 5], np.int32),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "add_bos_token": True,
    "add_space_prefix": True,
}
BYTE_LEVEL: dict[str, Any] = {
    "model": "gpt2",
    "pre": "llama-bpe",
    "tokens": ["<s>", "a", "b", "ab", "\u0120", "\u0120ab", "<think>"],
    "token_type": np.array([3, 1, 1, 1, 1, 1, 4], np.int32),
    "merges": ["a b", "\u0120 ab"],
    "bos_token_id": 0,
    "padding_token_id": 0,
    "add_eos_token": False,
}
BOTH = {"llama": SENTENCEPIECE, "gpt2": BYTE_LEVEL}


def prefixed(keys: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def read_and_use(path: Path) -> bool:
    """True if there is a tokenizer, which then works."""
    start = time.monotonic()
    message = ""
    try:
        tokenizer = read_tokenizer(GgufFile(path))
    except GgufError as error:
        message = str(error)
    if message:
        assert message.startswith(f"{path}: ")
        assert len(message) < 1000
        return False
    ids = tokenizer(TEXT)["input_ids"]
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert isinstance(tokenizer.decode(ids), str)
    assert time.monotonic() - start < MAX_SECONDS
    return True


@pytest.mark.parametrize("name", BOTH)
def test_each_byte_with_a_flipped_bit(name: str, tmp_path: Path) -> None:
    path, rng = tmp_path / "a.gguf", random.Random(0)
    write_gguf(path, prefixed(BOTH[name]), [])
    whole = path.read_bytes()
    assert read_and_use(path)
    outcomes = []
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        outcomes.append(read_and_use(path))
    assert 0 < sum(outcomes) < len(outcomes)


TOKENS = st.lists(
    st.one_of(st.sampled_from(LETTERS), st.text(max_size=6), st.text("ab", max_size=40)),
    min_size=1,
    max_size=12,
)
ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**31), 2**32 - 1),
    st.integers(-1, 12),
    st.floats(width=32),
    st.text(max_size=8),
    TOKENS,
    st.lists(st.integers(-9, 9), min_size=1, max_size=12).map(lambda v: np.array(v, np.int32)),
    st.lists(st.floats(width=32), max_size=12).map(lambda v: np.array(v, np.float32)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=no_check)
@given(
    name=st.sampled_from(sorted(BOTH)),
    changes=st.dictionaries(
        st.sampled_from(sorted(SENTENCEPIECE | BYTE_LEVEL)), ANY, min_size=1, max_size=3
    ),
)
def test_any_value_for_any_key(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    keys = {key: v for key, v in (BOTH[name] | changes).items() if v is not None}
    write_gguf(tmp_path / "a.gguf", prefixed(keys), [])
    read_and_use(tmp_path / "a.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=no_check)
@given(tokens=TOKENS, name=st.sampled_from(sorted(BOTH)), data=st.data())
def test_any_vocabulary(tokens: list[str], name: str, data: st.DataObject, tmp_path: Path) -> None:
    count = len(tokens)
    types = data.draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    keys = {**BOTH[name], "tokens": tokens, "token_type": np.array(types, np.int32)}
    if name == "llama":
        scores = st.floats(-9, 9, width=32)
        keys["scores"] = np.array(
            data.draw(st.lists(scores, min_size=count, max_size=count)), np.float32
        )
    else:
        pairs = st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)).map(" ".join)
        keys["merges"] = data.draw(st.lists(pairs, min_size=1, max_size=5))
    for role in ("bos", "eos", "unknown", "padding"):
        keys[f"{role}_token_id"] = data.draw(st.integers(0, count - 1))
    write_gguf(tmp_path / "a.gguf", prefixed(keys), [])
    read_and_use(tmp_path / "a.gguf")


def test_long_tokens_take_no_time(tmp_path: Path) -> None:
    """Every way to cut every one of them is looked at, and is a merge here."""
    for letters, longest, expected in (
        ("a", 256, None),
        ("abcdefghijklmnopqrstuvw", 256, "more than 1[0-9]{5} merges follow from the tokens"),
        ("a", 257, "a token of 257 characters, at most 256 are read"),
    ):
        tokens = [letter * length for letter in letters for length in range(1, longest + 1)]
        scores, types = np.zeros(len(tokens), np.float32), np.ones(len(tokens), np.int32)
        keys = {**SENTENCEPIECE, "tokens": tokens, "scores": scores, "token_type": types}
        write_gguf(tmp_path / "a.gguf", prefixed(keys), [])
        start = time.monotonic()
        if expected is None:
            assert read_and_use(tmp_path / "a.gguf")
        else:
            with pytest.raises(GgufError, match=f"a.gguf: 'tokenizer.ggml.tokens': {expected}"):
                read_tokenizer(GgufFile(tmp_path / "a.gguf"))
        assert time.monotonic() - start < MAX_SECONDS


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 2**16, 2**31 - 1, 2**31, 2**32 - 1]),
    st.sampled_from([-1, -(2**31), 2**63 - 1, 2**64 - 1]),
    st.floats(width=32),
    st.sampled_from([0.0, -1.0, 1e-30, 1e4, 1e30]),
    st.booleans(),
    st.sampled_from(["", "linear", "yarn", "none", "llama"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
SMALL = {"vocab_size": 5, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_any_value_in_a_config(
    model_type: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    scalar = {"query_pre_attn_scalar": 8} if model_type == "gemma2" else {}
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = make_model(model_type, **SMALL, **scalar, rope_parameters=rope)
    write_model(tmp_path / "a.gguf", model, TensorType.F32)
    names = sorted(k for k in GgufFile(tmp_path / "a.gguf").metadata if k.startswith(model_type))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]

    @settings(max_examples=40, deadline=None, suppress_health_check=no_check)
    @given(changes=st.dictionaries(st.sampled_from(names), NUMBERS, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        write_model(tmp_path / "b.gguf", model, TensorType.F32, changes)
        file = GgufFile(tmp_path / "b.gguf")
        message, found = "", expected
        try:
            found = {name: value.shape for name, value in read_state_dict(file)}
        except GgufError as error:
            message = str(error)
        assert found == expected
        assert not message or message.startswith(f"{tmp_path / 'b.gguf'}: ")

    check()
