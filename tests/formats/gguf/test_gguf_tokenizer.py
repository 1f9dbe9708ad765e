"""Tokenizers out of GGUF files and into them: against those of transformers with the same
vocabulary, through metadata that the tests put together themselves."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import effllm.demo
from effllm.formats.gguf import (
    GgufError,
    GgufFile,
    read_tokenizer,
    tokenizer_metadata,
    write_gguf,
)

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra effllm[hf]")
transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

CORPUS = [Path(str(re.__file__)).read_text(), Path(str(json.__file__)).read_text()]
TEXTS = [
    "",
    " ",
    "a",
    "def read_lines(path):\n\treturn [line.rstrip() for line in open(path)]\n",
    "  two spaces,   three;\n\n\n  and 1234567 digits 3.14",
    "It's WE'LL they'Re I'm",
    "na\u00efve \u4f60\u597d \U0001f999\U0001f999 \u0915\u094d\u0937 \u0b85",
    "\r\n\t \r",
    "<|endoftext|>after<|pad|> <|endoftext|>",
    "x" * 60 + " " * 30 + "!?" * 9,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|pad|>"]
G = "tokenizer.ggml."


def trained(pre_tokenizer: Any, specials: list[str] = SPECIAL, **options: Any) -> Any:
    """A small vocabulary of byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def split(pattern: str) -> Any:
    pre = tokenizers.pre_tokenizers
    return pre.Sequence(
        [
            pre.Split(tokenizers.Regex(pattern), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def wrapped(tokenizer: Any, **options: Any) -> Any:
    roles = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0], "pad_token": SPECIAL[1]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(roles | options))


def parts(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


@cache
def sentencepiece() -> Any:
    """As Llama 2: three special tokens, the bytes, then tokens in the order of their merges."""
    model = tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    merges = transformers.tokenization_utils_base.generate_merges(
        vocab, {token: -i for token, i in vocab.items()}
    )
    llama = transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    # As the tokenizer.json of Llama 2 has it: a space in front even of spaces.
    norm = tokenizers.normalizers
    llama.backend_tokenizer.pre_tokenizer = None
    llama.backend_tokenizer.normalizer = norm.Sequence(
        [norm.Prepend("\u2581"), norm.Replace(" ", "\u2581")]
    )
    return llama


@cache
def reference(name: str) -> Any:
    """The tokenizer of transformers."""
    pre = tokenizers.pre_tokenizers
    if name == "gpt-2":
        return transformers.AutoTokenizer.from_pretrained(effllm.demo.model_path())
    if name == "llama":
        return sentencepiece()
    if name == "smollm":
        digits = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)])
        return wrapped(trained(digits))
    if name == "llama-bpe":
        tokenizer = trained(split(LLAMA3), ignore_merges=True)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
        )
        return wrapped(tokenizer)
    assert name == "qwen2"
    model = json.loads(trained(split(LLAMA3.replace("{1,3}", ""))).to_str())["model"]
    roles = {"unk_token": None, "eos_token": SPECIAL[0], "pad_token": SPECIAL[1]}
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **roles)


NAMES = ["gpt-2", "llama-bpe", "qwen2", "smollm", "llama"]


def by_hand(name: str) -> dict[str, Any]:
    """The metadata as llama.cpp's converter would write it."""
    found = parts(reference(name))
    vocab: dict[str, int] = found["model"]["vocab"]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    types = np.ones(len(tokens), np.int32)
    metadata: dict[str, Any] = {"tokens": tokens, "token_type": types}
    special = [token["id"] for token in found["added_tokens"] if token["special"]]
    types[special] = 3
    if name == "llama":
        types[0] = 2
        types[3:259] = 6
        metadata |= {"model": "llama", "pre": "default"}
        metadata |= {"scores": -np.arange(len(tokens), dtype=np.float32)}
        metadata |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    else:
        merges = [" ".join(pair) for pair in found["model"]["merges"]]
        metadata |= {"model": "gpt2", "pre": name, "merges": merges}
        metadata |= {"eos_token_id": 0, "padding_token_id": 1}
        metadata |= {} if name == "qwen2" else {"bos_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def read(path: Path, metadata: dict[str, Any]) -> Any:
    write_gguf(path, {k: v for k, v in metadata.items() if v is not None}, [])
    return read_tokenizer(GgufFile(path))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: read(folder / "a.gguf", by_hand(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_texts_are_those_of_transformers(name: str, ours: dict[str, Any]) -> None:
    theirs, mine = reference(name), ours[name]
    for text in TEXTS:
        ids = mine(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert mine.decode(ids, skip_special_tokens=skip) == decoded
    for role in ("bos", "eos", "pad", "unk"):
        expected = getattr(theirs, f"{role}_token_id")
        assert getattr(mine, f"{role}_token_id") == expected, role
    assert len(mine) == len(theirs)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=40), name=st.sampled_from(NAMES))
def test_any_text(text: str, name: str, ours: dict[str, Any]) -> None:
    assert ours[name](text)["input_ids"] == reference(name)(text)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_that_of_the_converter(name: str, tmp_path: Path) -> None:
    theirs = reference(name)
    found, expected = tokenizer_metadata(theirs, len(theirs)), by_hand(name)
    if name == "llama":
        # The order of scores counts, and that of single characters does not.
        order = np.argsort(-found["tokenizer.ggml.scores"], kind="stable")
        merged = [i for i in order if len(expected["tokenizer.ggml.tokens"][i]) > 1 and i > 258]
        assert merged == sorted(merged)
        del expected["tokenizer.ggml.scores"]
    for key, value in expected.items():
        assert np.array_equal(found[key], value), key
    assert found["tokenizer.ggml.add_bos_token"] == (name in ("llama", "llama-bpe"))
    again = read(tmp_path / "a.gguf", found)
    for text in TEXTS[1:]:
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
    assert set(tokenizer_metadata(again, len(again))) == set(found)


def test_the_gguf_package_and_transformers_read_our_keys(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra effllm[formats] (gguf)")
    for name in ("gpt-2", "llama-bpe", "llama"):
        theirs = reference(name)
        metadata = {"general.architecture": "llama", **tokenizer_metadata(theirs, len(theirs))}
        write_gguf(tmp_path / "a.gguf", metadata, [])
        reader = gguf.GGUFReader(tmp_path / "a.gguf")
        for key, value in metadata.items():
            found = reader.get_field(key).contents()
            assert np.array_equal(found, value), key
        if name == "llama-bpe":
            continue  # which transformers 5.17 splits otherwise
        again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
        plain = {"add_special_tokens": False}
        for text in (TEXTS[3], TEXTS[5], TEXTS[6]):  # its Llama adds no space to spaces
            assert again(text, **plain)["input_ids"] == theirs(text, **plain)["input_ids"]


def test_unused_ids_fill_the_vocabulary(tmp_path: Path) -> None:
    theirs = reference("qwen2")
    found = tokenizer_metadata(theirs, len(theirs) + 2)
    assert found["tokenizer.ggml.tokens"][-2:] == ["[PAD500]", "[PAD501]"]
    assert found["tokenizer.ggml.token_type"][-3:].tolist() == [1, 5, 5]
    again = read(tmp_path / "a.gguf", found)
    assert again("a [PAD500]")["input_ids"] == theirs("a [PAD500]")["input_ids"]
    with pytest.raises(GgufError, match="token 499 of the tokenizer is beyond the vocabulary"):
        tokenizer_metadata(theirs, 499)


@pytest.mark.parametrize("name", ["gpt-2", "llama"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_ends_are_added_as_the_file_says(name: str, bos: bool, eos: bool, tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = read(tmp_path / "a.gguf", by_hand(name) | flags)
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos
    assert tokenizer("a b")["input_ids"] == expected
    assert tokenizer("a b", "a b")["input_ids"] == expected * 2
    found = tokenizer_metadata(tokenizer, len(tokenizer))
    assert found.items() >= flags.items()
    tokenizer.save_pretrained(tmp_path / "folder")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert again("a b")["input_ids"] == expected
    assert again.decode(plain) == "a b"


def test_user_defined_tokens_stay_whole(tmp_path: Path) -> None:
    """Spaces of SentencePiece are spelled either way by converters."""
    for name, words in (
        ("gpt-2", ["<think>", "    "]),
        ("llama", ["<think>", "  "]),
        ("llama", ["\u2581" * 3]),
    ):
        metadata = by_hand(name)
        tokens, count = metadata["tokenizer.ggml.tokens"], len(metadata["tokenizer.ggml.tokens"])
        vocabulary = [token for token in tokens if token not in words] + words
        metadata["tokenizer.ggml.tokens"] = vocabulary
        added = len(vocabulary) - count
        types = np.append(metadata["tokenizer.ggml.token_type"], np.ones(added, np.int32))
        types[-len(words) :] = 4
        metadata["tokenizer.ggml.token_type"] = types
        if name == "llama":
            scores = metadata["tokenizer.ggml.scores"]
            metadata["tokenizer.ggml.scores"] = np.append(scores, np.zeros(added, np.float32))
            metadata["tokenizer.ggml.add_space_prefix"] = False  # or it comes after them too
        tokenizer = read(tmp_path / "a.gguf", metadata)
        for i, word in enumerate(words):
            text = "x" + word.replace("\u2581", " ") + "y"
            ids = tokenizer(text)["input_ids"]
            assert len(vocabulary) - len(words) + i in ids, word
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_merges_of_special_tokens_mean_nothing(tmp_path: Path) -> None:
    """The file calls none of its tokens special, but for their roles."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "<s>a", "\u2581a"]
    keys = {"model": "llama", "tokens": tokens, "scores": -np.arange(7, dtype=np.float32)}
    tokenizer = read(tmp_path / "a.gguf", {G + key: value for key, value in keys.items()})
    assert tokenizer("a<s>a")["input_ids"] == [1, 6, 1, 6]
    found = tokenizer_metadata(tokenizer, 7)
    assert found[f"{G}token_type"].tolist() == [2, 3, 3, 1, 1, 1, 1]
    assert read(tmp_path / "b.gguf", found)("a<s>a")["input_ids"] == [1, 6, 1, 6]


def test_chat_templates(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    one = by_hand("gpt-2") | {"tokenizer.chat_template": template}
    tokenizer = read(tmp_path / "a.gguf", one)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>hi"
    found = tokenizer_metadata(tokenizer, len(tokenizer))
    assert found["tokenizer.chat_template"] == template
    two = one | {"tokenizer.chat_template.tool_use": "tools"}
    tokenizer = read(tmp_path / "a.gguf", two)
    assert tokenizer.chat_template == {"default": template, "tool_use": "tools"}
    assert (
        tokenizer_metadata(tokenizer, len(tokenizer)).items()
        >= {
            "tokenizer.chat_template.tool_use": "tools",
            "tokenizer.chat_template": template,
        }.items()
    )


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("gpt-2", {"model": None}, f"metadata key '{G}model' is missing"),
    ("gpt-2", {"model": "bert"}, f"'{G}model' is 'bert', only 'llama' and 'gpt2' can be read"),
    ("gpt-2", {"pre": None}, f"metadata key '{G}pre' is missing"),
    ("gpt-2", {"pre": "jais"}, f"'{G}pre' is 'jais', only gpt-2, smollm, .*, tekken can be read"),
    ("gpt-2", {"pre": 3}, f"'{G}pre' must be a string"),
    ("gpt-2", {"tokens": None}, f"'{G}tokens' is missing"),
    ("gpt-2", {"tokens": np.array([], np.int32)}, f"'{G}tokens' is empty"),
    ("gpt-2", {"tokens": [1, 2]}, f"'{G}tokens' must be an array of strings"),
    ("gpt-2", {"tokens": ["a", "b", "a"]}, f"'{G}tokens' has 'a' twice"),
    ("gpt-2", {"token_type": [1]}, f"'{G}token_type' must have 4096 values, got 1"),
    ("gpt-2", {"token_type": [0.5] * 4096}, f"'{G}token_type' must be an array of numbers"),
    ("gpt-2", {"merges": None}, f"'{G}merges' is missing"),
    ("gpt-2", {"merges": ["ab"]}, f"'{G}merges' has 'ab', but '' is no token"),
    ("gpt-2", {"merges": ["i n", "a \u4f60"]}, "has 'a \u4f60', but '\u4f60' is no token"),
    ("gpt-2", {"merges": ["z q"]}, "has 'z q', but 'zq' is no token"),
    ("gpt-2", {"bos_token_id": 4096}, f"'{G}bos_token_id' must be an integer below 4096"),
    ("gpt-2", {"add_bos_token": 1}, f"'{G}add_bos_token' must be a bool, got '1'"),
    ("llama", {"scores": None}, f"'{G}scores' is missing"),
    ("llama", {"scores": [1.0]}, f"'{G}scores' must have 500 values, got 1"),
    ("llama", {"scores": np.full(500, np.nan)}, f"'{G}scores' has values that are not finite"),
    ("llama", {"add_space_prefix": "x"}, f"'{G}add_space_prefix' must be a bool"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_files_without_a_tokenizer_that_can_be_read(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    metadata = by_hand(name) | {G + key: value for key, value in changes.items()}
    with pytest.raises(GgufError, match=message) as error:
        read(tmp_path / "a.gguf", metadata)
    assert str(error.value).startswith(f"{tmp_path / 'a.gguf'}: ")


def test_a_missing_id_is_none(tmp_path: Path) -> None:
    changes = {f"{G}padding_token_id": np.uint32(2**32 - 1)}
    assert read(tmp_path / "a.gguf", by_hand("gpt-2") | changes).pad_token is None


def test_tokenizers_that_cannot_be_written() -> None:
    def refuse(tokenizer: Any, message: str) -> None:
        with pytest.raises(GgufError, match=message):
            tokenizer_metadata(tokenizer, 5000)

    pre = tokenizers.pre_tokenizers
    refuse(object(), "a fast tokenizer is needed, got a object")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    refuse(transformers.PreTrainedTokenizerFast(tokenizer_object=words), "only BPE .* WordLevel")
    refuse(wrapped(trained(split(r"\w+"))), r"splits or normalises text as none of gpt-2, .*\\w")
    refuse(wrapped(trained(pre.ByteLevel(add_prefix_space=True))), "as none of gpt-2")
    refuse(wrapped(trained(split(LLAMA3))), "as none of")  # merges are not ignored
    both = trained(pre.ByteLevel(False))
    both.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {SPECIAL[1]}", special_tokens=[(SPECIAL[1], 1)]
    )
    refuse(wrapped(both), "adds more than begin and end tokens to a text")
    found = parts(sentencepiece())
    merges = found["model"]["merges"]
    # The first of two merges that make the same token.
    first = next(i for i, m in enumerate(merges) if "".join(m) == "".join(merges[i + 1]))
    for change, message in (
        ({"normalizer": None}, "treats spaces in a way that cannot be stored"),
        ({"normalizer": {"type": "NFC"}}, "treats spaces in a way that cannot be stored"),
        ({"merges": merges[2:]}, "merges do not follow from scores, such as"),
        ({"merges": merges[:first] + merges[first + 1 :] + [merges[first]]}, "are apart"),
    ):
        changed = {**found, **change, "model": found["model"]}
        if "merges" in changed:
            changed["model"] = {**found["model"], "merges": changed.pop("merges")}
        backend = tokenizers.Tokenizer.from_str(json.dumps(changed))
        refuse(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), message)
