"""What the host does in a step of generation beside the model, the draft and the verification.

    python bench/loop_host.py          # bench/results/loop_host.{json,md}

The model looks its answer up; steps are those of a GPU, over fixed memory, whose graphs are calls
here. What launches and transfers cost on a GPU is not in it: ``operations`` counts them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from speculative_gpu import Known
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effllm
from effllm import ops
from effllm.generation import step_graph
from effllm.generation.paged_model import PagedModel

RESULTS = Path(__file__).parent / "results"
VOCAB, PROMPT, NEW, RATE = 512, 100, 200, 0.8
VIEWS = (
    "view",
    "slice",
    "select",
    "unsqueeze",
    "expand",
    "as_strided",
    "alias",
    "detach",
    "unbind",
)


class LookUp(nn.Module):
    """A token's successor, whatever came before it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
            hidden_size=8, vocab_size=VOCAB, max_position_embeddings=None,
            _attn_implementation="effllm", get_text_config=lambda decoder: self.config,
        )  # fmt: skip
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.lm_head = nn.Linear(8, VOCAB, bias=False)
        self.follows = nn.functional.one_hot(torch.randperm(VOCAB)).float()
        self.states = torch.zeros(4096, 8)

    def get_output_embeddings(self) -> nn.Module:
        """Only what hooks it is called."""
        return self.lm_head

    def set_attn_implementation(self, name: str) -> None:
        """There is no attention."""
        self.config._attn_implementation = name

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | int, **rest: Any) -> Any:
        """Logits [1, R, V]."""
        ids = input_ids[0]
        if isinstance(logits_to_keep, Tensor):
            ids = ids[logits_to_keep]
        for hook in self.lm_head._forward_pre_hooks.values():
            hook(self.lm_head, (self.states[: len(ids)],))
        return SimpleNamespace(logits=self.follows[ids][None])


class Count(TorchDispatchMode):
    """Operations that a GPU would have to be told of: all but views."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls += name not in VIEWS and name != "_unsafe_view"
        return func(*args, **(kwargs or {}))


class Stopwatch:
    """Adds up the seconds of calls, of this thread: others may use the core meanwhile."""

    seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - started

        return timed


def measure(model: Any, batch: int, name: str, nodes: int, sizes: tuple[int, int] | None) -> Any:
    """A row: the least of five calls."""
    prompts = [Random(i).choices(range(VOCAB), k=PROMPT) for i in range(batch)]
    plain = effllm.generate(model, prompts, max_new_tokens=NEW)
    texts = [prompt + r.tokens for prompt, r in zip(prompts, plain, strict=True)]
    draft: Any = None if sizes is None else Known(texts, RATE, *sizes, VOCAB)
    apart = Stopwatch()
    verify, compact, forward = ops.tree_verify, ops.kv_compact, PagedModel._forward
    ops.tree_verify, ops.kv_compact = apart.around(verify), apart.around(compact)
    PagedModel._forward = apart.around(forward)
    if draft is not None:
        draft._propose = apart.around(draft._propose)
    best = float("inf")
    try:
        for _ in range(5):
            apart.seconds, started = 0.0, time.thread_time()
            results = effllm.generate(model, prompts, max_new_tokens=NEW, draft=draft, tree=nodes)
            best = min(best, time.thread_time() - started - apart.seconds)
        with Count() as count:
            effllm.generate(model, prompts, max_new_tokens=NEW, draft=draft, tree=nodes)
    finally:
        ops.tree_verify, ops.kv_compact, PagedModel._forward = verify, compact, forward
    steps = max(result.steps for result in results)
    return {
        "batch": batch,
        "draft": name,
        "nodes": nodes if draft else 1,
        "ms_per_step": round(1e3 * best / steps, 3),
        "operations": round(count.calls / steps, 1),
    }


def main() -> None:
    """Measures, and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step_graph.graph_problem = lambda model: None  # as if this were a GPU
    model = LookUp()
    kinds: list[tuple[str, int, tuple[int, int] | None]] = [
        ("none", 8, None), ("chain", 4, (3, 1)), ("chain", 8, (7, 1)), ("chain", 16, (15, 1)),
        ("tree", 16, (5, 3)), ("tree", 32, (7, 4)), ("tree", 64, (9, 7)),
    ]  # fmt: skip
    rows = [measure(model, batch, *kind) for batch in (1, 16) for kind in kinds]
    lines = [
        "# Milliseconds of the host in a step of generation",
        "",
        "Beside the model, the draft and the verification; the prompts' step and everything around",
        f"the steps of a call are shared out over them. {NEW} tokens, one core of a",
        f"{platform.machine()} CPU, torch {torch.__version__}. Operations are all but views, the",
        "three or four of the model among them. Made by `bench/loop_host.py`.",
        "",
        "| draft | nodes | batch 1: ms | operations | batch 16: ms | operations |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one, many in zip(rows[: len(kinds)], rows[len(kinds) :], strict=True):
        lines.append(
            f"| {one['draft']} | {one['nodes']} "
            + " ".join(f"| {r['ms_per_step']:.2f} | {r['operations']:.0f}" for r in (one, many))
            + " |"
        )
    print("\n".join(lines))
    (args.out / "loop_host.md").write_text("\n".join(lines) + "\n")
    (args.out / "loop_host.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
