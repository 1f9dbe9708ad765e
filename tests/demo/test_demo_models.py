"""The models that ship with the package, and the corpus rule behind them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from effllm import demo
from effllm.demo import corpus
from effllm.demo.evaluate import acceptance, fake_quantise

FOLDERS = {"model": demo.model_path(), "draft": demo.draft_path()}


def words(seed: int, count: int) -> str:
    """Random text with no repeated passage: `count` lexical tokens in lines of ten."""
    letters = np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, (count, 8))
    names = ["".join(map(chr, row)) for row in letters]
    return "\n".join(" ".join(names[i : i + 10]) for i in range(0, count, 10))


# ----------------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("name", FOLDERS)
def test_architecture(name: str) -> None:
    config = json.loads((FOLDERS[name] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
    assert config["max_position_embeddings"] == 2048
    assert config["vocab_size"] == 4096
    parameters = 0
    with safe_open(FOLDERS[name] / "model.safetensors", "pt") as weights:
        for key in weights.keys():  # noqa: SIM118  # not a mapping
            weight = weights.get_tensor(key)
            parameters += weight.numel()
            assert weight.dtype is torch.bfloat16, key
            assert weight.isfinite().all(), key
            if weight.dim() == 2:
                assert weight.shape[1] % 128 == 0, key
        assert ("lm_head.weight" in weights.keys()) == (name == "model")  # noqa: SIM118
    assert parameters == demo.training_record()[name]["parameters"]
    low, high = {"model": (7e6, 9e6), "draft": (0.9e6, 1.2e6)}[name]
    assert low <= parameters <= high


def test_size_of_all_files() -> None:
    folder = demo.model_path().parent
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(path.stat().st_size for path in files) <= 22e6


def test_one_tokenizer_for_both() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    assert (demo.model_path() / "tokenizer.json").read_bytes() == (
        demo.draft_path() / "tokenizer.json"
    ).read_bytes()
    tokenizer = tokenizers.Tokenizer.from_file(str(demo.model_path() / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.token_to_id(corpus.END_OF_TEXT) == 0
    text = 'def f(x):\n\treturn "é\u4e2d\U0001f600\x00"   # trailing  \r\n'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_record_shows_real_training() -> None:
    record = demo.training_record()
    for name in FOLDERS:
        chosen = min(record[name]["trials"], key=lambda t: t["curve"][-1]["validation"])
        losses = [row["held_out"] for row in chosen["curve"]]
        # The curve of what ships must not have turned up.
        assert losses[-1] <= 1.001 * min(losses)
        assert math.log(record[name]["held_out_perplexity_fp32"]) == pytest.approx(
            losses[-1], rel=2e-3
        )
    model = record["model"]
    assert model["held_out_perplexity_bf16"] < 9.0
    assert model["held_out_perplexity_int4_g64"] < 1.05 * model["held_out_perplexity_bf16"]
    assert record["corpus"]["held_out_modules"] == list(corpus.HELD_OUT)
    assert record["corpus"]["held_out_shingles_still_in_training"] <= 20


# ------------------------------------------------------------------------------------ loaded model


@pytest.fixture(scope="module")
def loaded() -> tuple[nn.Module, object]:
    pytest.importorskip("transformers")
    return demo.load(dtype=torch.float32)


def test_held_out_perplexity(loaded: tuple[nn.Module, object]) -> None:
    model, tokenizer = loaded
    windows = demo.held_out_tokens(tokenizer, context=256, limit=512)
    assert windows.shape == (2, 256)
    loss = demo.mean_nll(model, windows, batch_size=1)
    assert loss == pytest.approx(model(windows, labels=windows).loss.item(), rel=1e-5)
    # 10.4 was measured on these windows of Python 3.11; other versions differ in the text.
    assert math.exp(loss) < 14.0
    assert demo.perplexity(fake_quantise(model), windows) < 1.1 * math.exp(loss)


def test_windows_are_a_spread_of_the_full_text(loaded: tuple[nn.Module, object]) -> None:
    tokenizer = loaded[1]
    full = demo.held_out_tokens(tokenizer, context=1024)
    some = demo.held_out_tokens(tokenizer, context=1024, limit=4 * 1024 + 1)
    step = full.shape[0] / 4
    assert torch.equal(some, full[[int(i * step) for i in range(4)]])
    text = tokenizer.decode(full[0])  # type: ignore[attr-defined]
    assert demo.held_out_text().startswith(text)
    with pytest.raises(ValueError, match=r"must fill one window of 10000000 tokens, got \d+"):
        demo.held_out_tokens(tokenizer, context=10_000_000)


# -------------------------------------------------------------------------------------- evaluation


class Constant(nn.Module):
    """Gives the same logits for every token."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(logits)

    def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.row.expand(*ids.shape, -1))


def test_perplexity_of_known_distributions() -> None:
    windows = torch.zeros(3, 5, dtype=torch.int64)
    assert demo.perplexity(Constant(torch.zeros(40)), windows) == pytest.approx(40.0)
    probabilities = torch.tensor([0.25, 0.75])
    constant = Constant(probabilities.log())
    assert demo.perplexity(constant, windows, batch_size=2) == pytest.approx(4.0)
    shares = acceptance(constant, Constant(torch.zeros(2)), windows)
    assert shares["sampled"] == pytest.approx(0.75)


def test_fake_quantise_rounds_decoder_linears_only() -> None:
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Linear(128, 3)])
    model = nn.Module()
    model.model, model.lm_head = decoder, nn.Linear(128, 3)
    quantised = fake_quantise(model, group=64)
    assert torch.equal(quantised.lm_head.weight, model.lm_head.weight)
    for row, rounded in zip(
        decoder.layers[0].weight, quantised.model.layers[0].weight, strict=True
    ):
        for group in (slice(0, 64), slice(64, 128)):
            scale = row[group].abs().max().item() / 7.5
            codes = [min(max(round(w / scale) + 8, 0), 15) for w in row[group].tolist()]
            expected = torch.tensor([(code - 8) * scale for code in codes])
            torch.testing.assert_close(rounded[group].detach(), expected)


# ------------------------------------------------------------------------------------------ corpus


def test_held_out_modules_are_in_this_python() -> None:
    files = demo.corpus.held_out_files()
    assert list(files) == list(corpus.HELD_OUT)
    assert 300_000 <= sum(map(len, files.values())) <= 900_000
    assert demo.held_out_text().count(corpus.END_OF_TEXT) == len(files)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("csv.py", True),
        ("csv/reader.py", True),
        ("test/test_csv.py", True),
        ("test/test_dataclasses/__init__.py", True),
        ("_heapq.py", True),
        ("asyncio/queues.py", False),
        ("test/test_csvish.py", False),
        ("email/message.py", False),
    ],
)
def test_held_out_relatives(name: str, expected: bool) -> None:
    assert corpus.is_held_out_related(name) is expected


def test_training_corpus_leaves_out_what_it_must(tmp_path: Path) -> None:
    secret = words(0, 400)
    (tmp_path / "test").mkdir()
    (tmp_path / "site-packages").mkdir()
    own = words(1, 300)
    quoted = secret.split()
    texts = {
        "csv.py": secret,
        "test/test_csv.py": words(2, 300),
        "site-packages/foreign.py": words(3, 300),
        "own.py": own,
        "zcopy.py": own,
        "table.py": "\n".join(f"0x{i:04x}, {i}," for i in range(300)),
        "empty.py": "",
        # Reindented, with text around it: 150 shared tokens are 101 shared shingles of 50.
        "thief.py": words(4, 100) + "\n    " + "\n    ".join(quoted[100:250]) + "\n" + words(5, 50),
        # 55 shared tokens, 6 shingles: below the limit, so kept and counted.
        "quoter.py": words(6, 100) + " " + " ".join(quoted[:55]) + " " + words(7, 100),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes("# caf\xe9 ".encode("latin-1") * 50)

    found = corpus.training_corpus(tmp_path)
    assert list(found.files) == ["own.py", "quoter.py"]
    assert found.held_out_related == ["csv.py", "test/test_csv.py"]
    assert found.undecodable == ["latin.py"]
    assert found.tables == ["empty.py", "table.py"]
    assert found.duplicates == ["zcopy.py"]
    assert found.overlapping == {"thief.py": 101}
    assert found.shared_shingles_kept == 6
    assert found.held_out_shingles == 400 - corpus.SHINGLE + 1
    assert found.description()["excluded_overlapping"] == {"thief.py": 101}


def test_shingles_count_runs_of_tokens() -> None:
    text = "a b c a b c a b d"
    tokens = text.split()
    expected = {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}
    assert corpus.shingles(text, 3).size == len(expected)
    assert np.array_equal(corpus.shingles(text, 3), corpus.shingles("a b\n  c a b\tc a b d", 3))
    assert corpus.shingles("a b", 3).size == 0
    both = corpus.common(corpus.shingles("x a b c", 3), corpus.shingles(text, 3))
    assert both.tolist() == corpus.shingles("a b c", 3).tolist()


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"needs the sources of calendar, .* found none"):
        corpus.held_out_files(tmp_path)
