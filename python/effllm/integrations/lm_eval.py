"""Tasks of lm-eval, scored with a loaded model through its Hugging Face wrapper."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: name of the task, or of a group of tasks.
        metric: as lm-eval calls it, with its filter in brackets unless that is "none".
        value: of the metric.
        stderr: its standard error, None where lm-eval gives none.
        examples: that were scored, None for a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int | None


class TaskSuite:
    """Tasks by name, found before a model is loaded for them."""

    def __init__(self, names: Sequence[str], include_path: str | Path | None = None) -> None:
        """Tasks that come with lm-eval, or are YAML files in ``include_path``.

        Args:
            names: of tasks and groups; ``*`` stands for any characters.
            include_path: a folder of task definitions of one's own.

        Raises:
            ImportError: lm-eval is missing (``pip install 'effllm[eval]'``).
            FileNotFoundError: no such folder.
            ValueError: no name, or one that no task has.
        """
        manager = _import("lm_eval.tasks").TaskManager
        if include_path is not None and not Path(include_path).is_dir():
            raise FileNotFoundError(f"{include_path} is no folder of task definitions")
        self._manager = manager(include_path=None if include_path is None else str(include_path))
        # A task that does not exist would show only after the model is loaded.
        missing = [name for name in names if not self._manager.match_tasks([name])]
        if missing or not names:
            raise ValueError(f"lm-eval has no task {', '.join(missing) or 'of an empty name'}")
        self.names: list[str] = list(self._manager.match_tasks(list(names)))

    def score(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 4,
        context: int | None = None,
        limit: int | None = None,
    ) -> list[TaskScore]:
        """Every metric of every task, in lm-eval's order, without few-shot examples unless a task
        is defined with some.

        Args:
            model: a causal language model of transformers, on the device that shall compute.
            tokenizer: of transformers.
            batch_size: requests at once.
            context: tokens at most; what is before them is cut off. The model's own if None.
            limit: examples of each task; all if None.
        """
        wrapped = _import("lm_eval.models.huggingface").HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=context,
            # Log-probabilities of 16-bit logits would tie where the logits do not.
            softmax_dtype="float32",
        )
        found = _import("lm_eval").simple_evaluate(
            model=wrapped,
            tasks=self.names,
            task_manager=self._manager,
            limit=limit,
            log_samples=False,
        )
        return read_scores(found)


def read_scores(found: dict[str, Any]) -> list[TaskScore]:
    """The scores in what ``lm_eval.simple_evaluate`` returns.

    There a task has "<metric>,<filter>" and "<metric>_stderr,<filter>", the latter "N/A" where
    there is no formula, beside entries that are no metrics.
    """
    scores = []
    for task, values in found["results"].items():
        examples = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = values.get(f"{metric}_stderr,{name}")
            scores.append(
                TaskScore(
                    task,
                    metric if name == "none" else f"{metric} ({name})",
                    float(value),
                    None if stderr is None or isinstance(stderr, str) else float(stderr),
                    examples,
                )
            )
    return scores


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"tasks need lm-eval and what it needs ({error}): pip install 'effllm[eval]'"
        ) from error
