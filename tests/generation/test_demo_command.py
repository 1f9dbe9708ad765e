"""`python -m effllm demo`, on a tiny random model instead of the bundled one."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import pytest
import torch

import effllm
from effllm import demo
from effllm.cli import demo as command


class Letters:
    """A tokenizer: token i is the i-th character from the space on."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) - 32 for char in text]}

    def decode(self, tokens: list[int], **options: bool) -> str:
        return "".join(chr(token + 32) for token in tokens)


@pytest.fixture
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--prompt", "def f", "--device", "cpu", "--max-new-tokens", "5"])


def test_two_rows_and_a_machine_readable_end(
    llama: Any,
    arguments: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = llama.to(torch.bfloat16)
    windows = torch.randint(1, 97, (4, 128))
    monkeypatch.setattr(demo, "load", lambda **options: (model, Letters()))
    monkeypatch.setattr(demo, "held_out_tokens", lambda tokenizer, **options: windows)
    before = command.weight_bytes(model)
    assert command.run(arguments) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[-1].startswith("demo ok: ")
    result = json.loads(lines[-1].removeprefix("demo ok: "))
    assert result["device"] == "cpu"
    assert result["eval_tokens"] == windows.numel()
    assert result["bf16"]["weight_bytes"] == before
    linear = sum(
        module.qweight.nbytes + module.scales.nbytes
        for module in model.modules()
        if isinstance(module, effllm.nn.Int4Linear)
    )
    others = 97 * 64 * 2 + 7 * 64 * 2 + model.model.rotary_emb.inv_freq.nbytes * 2
    assert result["int4"]["weight_bytes"] == linear + others
    assert result["perplexity_ratio"] == pytest.approx(
        result["int4"]["perplexity"] / result["bf16"]["perplexity"], abs=1e-4
    )
    assert result["int4"]["perplexity"] != result["bf16"]["perplexity"]
    for row in ("bf16", "int4"):
        assert result[row]["tokens_per_s"] > 0
        assert result[row]["drafted_tokens_per_s"] > 0
        assert 1 <= result[row]["tokens_per_step"] <= 5
    assert "def f" + result["int4"]["sample"] in out


def test_a_missing_transformers_is_one_line(
    arguments: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert command.run(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "effllm[hf]" in captured.err


@pytest.mark.parametrize("name", ["tpu", "meta"])
def test_wrong_devices(
    arguments: argparse.Namespace, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.device = name
    assert command.run(arguments) == 1
    assert f"--device must be cpu or cuda, got {name}" in capsys.readouterr().err
