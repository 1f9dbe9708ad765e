"""`effllm eval --tasks`: what lm-eval is asked, and with the real one, that its answer is right."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from effllm import demo
from effllm.cli import main
from effllm.nn import Int4Linear

pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

MODEL = str(demo.draft_path())

# As lm-eval 0.4.13 returns them.
FOUND = {
    "results": {
        "mmlu": {"name": "mmlu", "alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": "N/A"},
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": 0.125,
            "exact_match,flexible-extract": 1,
            "exact_match_stderr,flexible-extract": 0.0,
            "bypass,none": "N/A",
        },
    },
    "n-samples": {"gsm8k": {"original": 100, "effective": 16}},
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules in place of lm-eval's, and what they were called with."""
    calls: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            calls["include_path"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            known = ["gsm8k", "mmlu", "mmlu_law"]
            return [
                task
                for task in known
                if any(re.fullmatch(name.replace("*", ".*"), task) for name in names)
            ]

    class HFLM:
        def __init__(self, **options: Any) -> None:
            calls["wrapper"] = options

    def simple_evaluate(**options: Any) -> Any:
        calls["evaluate"] = options
        return FOUND

    package, tasks, models, wrapper = (
        ModuleType(name)
        for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    )
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    wrapper.HFLM = HFLM  # type: ignore[attr-defined]
    for module in (package, tasks, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    calls["manager"], calls["wrapped"] = TaskManager, HFLM
    return calls


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.py"
    path.write_text(demo.held_out_text()[:4000])
    return str(path)


def test_what_lm_eval_is_asked(
    fake: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quantised model on our kernels, with our attention; its text is scored beside the tasks."""
    quantised, out = tmp_path / "quantised", tmp_path / "results.json"
    command = ["quantize", MODEL, "--method", "linear", "--group", "64", "--out", str(quantised)]
    assert main(command) == 0
    capsys.readouterr()
    command = ["eval", str(quantised), "--tasks", "mmlu,gsm8k", "--include-path", str(tmp_path)]
    command += ["--limit", "300", "--batch-size", "3", "--context", "128"]
    assert main([*command, "--text", text, "--out", str(out)]) == 0

    assert fake["include_path"] == str(tmp_path)
    wrapper = fake["wrapper"]
    model, tokenizer = wrapper.pop("pretrained"), wrapper.pop("tokenizer")
    assert wrapper == {
        "backend": "causal",
        "batch_size": 3,
        "max_length": 128,
        "softmax_dtype": "float32",
    }
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)
    assert model.config._attn_implementation == "effllm"
    assert not model.training
    assert tokenizer("def f").input_ids == demo.load(demo.draft_path())[1]("def f").input_ids
    evaluate = fake["evaluate"]
    assert isinstance(evaluate.pop("model"), fake["wrapped"])
    assert isinstance(evaluate.pop("task_manager"), fake["manager"])
    assert evaluate == {"tasks": ["gsm8k", "mmlu"], "limit": 300, "log_samples": False}

    perplexity, *table = capsys.readouterr().out.splitlines()
    assert re.match(r"perplexity \S+ over 299 tokens \(context 128, stride 64\)", perplexity)
    assert table == [
        "task   metric                           value  stderr  examples",
        "mmlu   acc                             0.2500",
        "gsm8k  exact_match (strict-match)      0.5000  0.1250        16",
        "gsm8k  exact_match (flexible-extract)  1.0000  0.0000        16",
    ]
    results = json.loads(out.read_text())
    assert f"perplexity {results['text']['perplexity']:.4f} over" in perplexity
    assert results["text"]["tokens"] == 299
    assert results["limit"] == 300
    assert results["tasks"][0] == {
        "task": "mmlu",
        "metric": "acc",
        "value": 0.25,
        "stderr": None,
        "examples": None,
    }
    assert [row["value"] for row in results["tasks"]] == [0.25, 0.5, 1.0]


def test_defaults_and_patterns(fake: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a context it is the model's."""
    assert main(["eval", MODEL, "--tasks", "mmlu*"]) == 0
    assert fake["include_path"] is None
    assert fake["wrapper"]["max_length"] is None
    assert fake["wrapper"]["batch_size"] == 4
    assert fake["evaluate"]["tasks"] == ["mmlu", "mmlu_law"]
    assert fake["evaluate"]["limit"] is None
    assert capsys.readouterr().out.startswith("task ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to score: --text FILE or --tasks NAME,NAME is needed"),
        (["--tasks", "mmlu,helaswag,x*"], "lm-eval has no task helaswag, x\\*"),
        (["--tasks", ","], "lm-eval has no task of an empty name"),
        (["--tasks", "mmlu", "--include-path", "none/"], "none/ is no folder of task definitions"),
        (["--tasks", "mmlu", "--out", "none/o.json"], "--out none/o.json: its folder does not"),
    ],
)
def test_errors_come_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    fake: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("effllm.load", None)
    assert main(["eval", MODEL, *arguments]) == 1
    assert re.fullmatch(f"effllm eval: {message}.*\n", capsys.readouterr().err)


def test_a_missing_lm_eval_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["eval", MODEL, "--tasks", "hellaswag"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("effllm eval: tasks need lm-eval")
    assert error.endswith("pip install 'effllm[eval]'\n")
    assert error.count("\n") == 1


# -- the real one ---------------------------------------------------------------------------------

TASK = """
task: effllm_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""

ROWS = [
    ("import os\nfor name in os.listdir(path):\n    print(", ["name)", "zebra("], 0),
    ("class A:\n    def __init__(", ["self):", "17 +"], 1),
    ("def f(x):\n   ", [" %% 3", " return x"], 1),
    ("if x is not", [" None:", " for each of them"], 0),
    ("try:\n    pass\nexcept", [" ValueError:", " += 1"], 0),
    ("while", [" True:\n", " ]]"], 1),
    ("for i in", [" range(10):", " class"], 0),
]


@torch.no_grad()
def best_choice(model: Any, tokenizer: Any, text: str, choices: list[str]) -> int:
    """The continuation with the largest sum of log-probabilities, one pass for each."""
    prefix = tokenizer(text).input_ids
    totals = []
    for choice in choices:
        ids = torch.tensor([tokenizer(text + choice).input_ids])
        log_p = model(ids).logits[0, :-1].float().log_softmax(-1)
        chosen = log_p.gather(-1, ids[0, 1:, None])[len(prefix) - 1 :]
        totals.append(float(chosen.sum()))
    return totals.index(max(totals))


def test_a_task_by_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task in a folder of one's own, without a network, against log-probabilities by hand.

    Some labels are wrong, so that neither all nor none of the answers count.
    """
    for name in ("lm_eval.tasks", "lm_eval.models.huggingface"):
        pytest.importorskip(name, reason="needs the extra effllm[eval]", exc_type=ImportError)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, data, out = tmp_path / "tasks", tmp_path / "rows.jsonl", tmp_path / "results.json"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TASK.format(data=data))
    keys = ("text", "choices", "label")
    data.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in ROWS))
    command = ["eval", MODEL, "--tasks", "effllm_tiny", "--include-path", str(folder)]
    assert main([*command, "--batch-size", "4", "--limit", "6", "--out", str(out)]) == 0

    model, tokenizer = demo.load(demo.draft_path())
    right = [best_choice(model, tokenizer, text, c) == label for text, c, label in ROWS[:6]]
    assert 0 < sum(right) < 6
    (row,) = json.loads(out.read_text())["tasks"]
    assert (row["task"], row["metric"], row["examples"]) == ("effllm_tiny", "acc", 6)
    assert row["value"] == pytest.approx(sum(right) / 6)
    assert row["stderr"] > 0
