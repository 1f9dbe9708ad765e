"""The whole loop on a GPU: tokens per second with drafts and without, in the same run.

    python bench/speculative_gpu.py            # bench/results/speculative-<card>.{json,md}
    python bench/speculative_gpu.py --quick    # a part of it, in a minute
    python bench/speculative_gpu.py --device cpu --shape tiny --quick    # does it run?

Two targets. One has the shape of Llama 3.1 8B and random weights (``llama_shaped.py``), in bf16 and
int4; its drafts know what plain decoding said, and propose the right token with a set probability
at each depth. The other is the demo model with drafts that are real; it needs transformers.
Rows are written as they come; what is not measured within ``--seconds`` is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import llama_shaped
import speculative
import torch
from torch import Tensor

import effllm
from effllm import demo
from effllm.speculative import DraftRequest, Drafts, TokenTree

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW = 128, 256  # tokens
DEMO_NEW, WARM_UP = 96, 16
# Nodes of a tree: the depth of its path, and the children of each node along it.
TREES = {16: (5, 3), 32: (7, 4), 64: (9, 7)}
CHAINS = (4, 8, 16)


@dataclass
class Known:
    """Knows the texts to come. At each depth the right token is among the children of the path with
    probability ``rate``, at a random rank; where it is not, none of what follows can be right."""

    texts: list[list[int]]
    rate: float
    depth: int
    children: int
    vocab: int
    times: list[tuple[float, int]] = field(default_factory=list)  # of each step, its sequences
    seconds: list[float] = field(default_factory=list)  # that its trees took

    @contextmanager
    def session(self, model: Any, prompts: Any, **options: Any) -> Iterator[Any]:
        self.times, self.seconds = [], []
        yield self._propose

    def _propose(self, requests: Sequence[DraftRequest], hidden: Tensor) -> Drafts:
        self.times.append((time.perf_counter(), len(requests)))
        drafts = Drafts([self._tree(request) for request in requests])
        self.seconds.append(time.perf_counter() - self.times[-1][0])
        return drafts

    def _tree(self, request: DraftRequest) -> TokenTree:
        start = len(request.text)
        random = Random(start * 1009 + request.index)
        tokens, parents, path = [request.text[-1]], [-1], 0
        for token in self.texts[request.index][start : start + min(self.depth, request.max_depth)]:
            children = [(token + 1 + i) % self.vocab for i in range(self.children)]
            rank = random.randrange(self.children)
            if random.random() < self.rate:
                children[rank] = token
            parents += [path] * self.children
            path = len(tokens) + rank
            tokens += children
        count = request.max_nodes
        return TokenTree(tokens[:count], parents[:count])


@dataclass
class Clock:
    """The ``stream`` of a call: when the prompts' step ended, and each step of plain decoding."""

    times: list[tuple[float, int]] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    _in_step: int = 0

    def __call__(self, index: int, token: int, text: str) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if index == 0:
            self.times.append((self.last, 0))


def timed(model: Any, prompts: list[list[int]], draft: Any, **options: Any) -> dict[str, Any]:
    """One call: what it said, and how long its steps took after the prompts' own."""
    clock = Clock()
    results = effllm.generate(model, prompts, draft=draft, stream=clock, stop_tokens=(), **options)
    new = sum(len(result.tokens) for result in results)
    # Only steps that all sequences take part in: those at the end have less to do.
    times = clock.times
    if isinstance(draft, Known):
        times = [(at, n) for at, n in draft.times if n == len(prompts)]
    steps = [after - before for (before, _), (after, _) in pairwise(times)]
    return {
        "texts": [result.tokens for result in results],
        "seconds": clock.last - clock.first,
        "tokens_per_s": (new - len(prompts)) / (clock.last - clock.first),
        # A step of a sequence, the prompts' left out.
        "tokens_per_step": (new - len(prompts)) / max(sum(r.steps - 1 for r in results), 1),
        "ms_per_step": 1e3 * median(steps) if steps else 0.0,
        "draft_ms": 1e3 * median(getattr(draft, "seconds", None) or [0.0]),
    }


def equal_share(texts: list[list[int]], expected: list[list[int]]) -> float:
    """Of all tokens, those before a text's first difference."""
    same = total = 0
    for text, other in zip(texts, expected, strict=True):
        differ = (i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b)
        same += next(differ, len(text))
        total += len(text)
    return same / total


def best_of(turns: int, model: Any, prompts: list[list[int]], draft: Any, **options: Any) -> Any:
    """The quickest call, behind a short one, in which kernels are loaded."""
    timed(model, prompts, draft, **(options | {"max_new_tokens": WARM_UP}))
    runs = [timed(model, prompts, draft, **options) for _ in range(turns)]
    return min(runs, key=lambda run: run["seconds"])


def shaped_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The 8B-shaped target."""
    shape = getattr(llama_shaped, "LLAMA_8B" if args.shape == "8b" else "TINY")
    model = llama_shaped.make(shape, args.device, torch.bfloat16)
    for target in args.targets:
        if target == "int4":
            effllm.quantize_(
                model,
                effllm.Int4Config(group_size=128),
                filter_fn=lambda module, name: name != "lm_head",
                progress=False,
            )
        for batch in args.batches:
            random = Random(batch)
            prompts = [random.choices(range(shape.vocab_size), k=PROMPT) for _ in range(batch)]
            options = {"max_new_tokens": args.new}

            def row(name: str, rate: float | None, nodes: int, run: Any, plain: Any) -> Any:
                steady = run["ms_per_step"] or float("inf")
                per_s = 1e3 * run["tokens_per_step"] * batch / steady  # noqa: B023
                return {
                    "model": args.shape,
                    "target": target,  # noqa: B023
                    "batch": batch,  # noqa: B023
                    "draft": name,
                    "rate": rate,
                    "nodes": nodes,
                    "tokens_per_s": round(run["tokens_per_s"], 1),
                    "speedup": round(run["tokens_per_s"] / plain["tokens_per_s"], 3),
                    "tokens_per_step": round(run["tokens_per_step"], 3),
                    "ms_per_step": round(run["ms_per_step"], 3),
                    "draft_ms": round(run["draft_ms"], 3),
                    "tokens_per_s_full": round(per_s, 1),
                    "equal_tokens": round(equal_share(run["texts"], plain["texts"]), 4),
                }

            plain = best_of(args.turns, model, prompts, None, **options)
            yield row("none", None, 1, plain, plain)
            if args.device != "cpu":
                eager = best_of(1, model, prompts, None, cuda_graphs=False, **options)
                yield row("none, kernel by kernel", None, 1, eager, plain)
            texts = [p + text for p, text in zip(prompts, plain["texts"], strict=True)]
            kinds = [("chain", nodes, nodes - 1, 1) for nodes in CHAINS]
            kinds += [("tree", nodes, *sizes) for nodes, sizes in TREES.items()]
            for rate in args.rates:
                for name, nodes, depth, children in kinds:
                    if nodes not in args.nodes:
                        continue
                    draft = Known(texts, rate, depth, children, shape.vocab_size)
                    run = best_of(args.turns, model, prompts, draft, tree=nodes, **options)
                    yield row(name, rate, nodes, run, plain)


def demo_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The demo model and its drafts, with graphs and without; greedy and sampled."""
    _, tokenizer = demo.load(demo.draft_path())
    held_out = demo.held_out_tokens(tokenizer).flatten()
    for target in args.targets:
        model, _ = demo.load(device=args.device)
        if target == "int4":
            effllm.quantize_(model, effllm.Int4Config(group_size=64), progress=False)
        for batch in (1, 16):
            prompts = speculative.spread(held_out, batch)
            for graphs in (None,) if args.device == "cpu" else (None, False):
                kinds = speculative.drafts(args.device, graphs)
                for temperature in (None,) if args.quick else (None, 0.7):
                    options = {"max_new_tokens": DEMO_NEW, "temperature": temperature}
                    plain: Any = None
                    for name, draft, nodes in kinds:
                        run = best_of(
                            args.turns, model, prompts, draft,
                            tree=nodes, cuda_graphs=graphs, **options,
                        )  # fmt: skip
                        plain = plain or run
                        greedy = temperature is None
                        yield {
                            "model": "demo",
                            "target": target,
                            "batch": batch,
                            "graphs": graphs is None,
                            "mode": "greedy" if greedy else "sampled",
                            "draft": name,
                            "tokens_per_s": round(run["tokens_per_s"], 1),
                            "speedup": round(run["tokens_per_s"] / plain["tokens_per_s"], 3),
                            "tokens_per_step": round(run["tokens_per_step"], 3),
                            "equal_tokens": round(equal_share(run["texts"], plain["texts"]), 4)
                            if greedy
                            else None,
                        }


def table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    card, rows = result["card"], result["rows"]
    lines = [
        f"# Speculative decoding on {card}",
        "",
        f"Made by `bench/speculative_gpu.py` with torch {result['torch']} "
        f"(CUDA {result['cuda']}); each row is the quickest of so many calls: {result['turns']}.",
        "Tokens per second are of a whole call but for the prompts' step: recording graphs, and",
        'steps at the end with few sequences left, are part of them. "Full" counts the steps of',
        "the whole batch alone, by their median time, as of a server that has always more to do.",
        "Tokens per step are of each sequence. Nodes count the last certain token. Equal tokens:",
        "the share of greedy text before its first difference from plain decoding in the same run.",
        "",
        "## The shape of Llama 3.1 8B, random weights",
        "",
        f"{result['new']} tokens after prompts of {PROMPT}. Drafts know the text, and have the",
        "right token with a set probability at each depth: a chain as its next token, a tree among",
        f"{', '.join(f'{c} children (of {n} nodes)' for n, (_, c) in TREES.items())}.",
        "The head follows a permutation, so that greedy text hangs on no ties",
        "(`bench/llama_shaped.py`). What such a draft takes, Python, is part of a step.",
    ]
    shaped = [row for row in rows if row["model"] != "demo"]
    for target, batch in dict.fromkeys((row["target"], row["batch"]) for row in shaped):
        lines += [
            "",
            f"### {target}, batch {batch}",
            "",
            "| draft | nodes | right | tokens/s | x plain | tokens/step | ms/step | of it draft "
            "| full: tokens/s | equal tokens |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['draft']} | {r['nodes']} | {r['rate'] or ''} | {r['tokens_per_s']:.0f} "
            f"| {r['speedup']:.2f} | {r['tokens_per_step']:.2f} | {r['ms_per_step']:.2f} "
            f"| {r['draft_ms']:.2f} | {r['tokens_per_s_full']:.0f} | {r['equal_tokens']:.3f} |"
            for r in shaped
            if (r["target"], r["batch"]) == (target, batch)
        ]
    lines += ["", "## The demo model", "", f"{DEMO_NEW} tokens after held-out prompts."]
    found = [row for row in rows if row["model"] == "demo"]
    if not found:
        lines += ["", "Not measured."]
    for key in dict.fromkeys((r["target"], r["batch"], r["mode"]) for r in found):
        lines += [
            "",
            f"### {key[0]}, batch {key[1]}, {key[2]}",
            "",
            "| draft | tokens/s | x plain | tokens/step | equal tokens | kernel by kernel |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        of_key = [r for r in found if (r["target"], r["batch"], r["mode"]) == key]
        eager = {r["draft"]: r["tokens_per_s"] for r in of_key if not r["graphs"]}
        for r in of_key:
            if r["graphs"]:
                equal = "" if r["equal_tokens"] is None else f"{r['equal_tokens']:.3f}"
                without = f"{eager[r['draft']]:.0f}" if r["draft"] in eager else ""
                lines.append(
                    f"| {r['draft']} | {r['tokens_per_s']:.0f} | {r['speedup']:.2f} "
                    f"| {r['tokens_per_step']:.2f} | {equal} | {without} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes the two files after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b")
    parser.add_argument("--targets", nargs="*", default=["bf16", "int4"])
    parser.add_argument("--batches", nargs="*", type=int)
    parser.add_argument("--nodes", nargs="*", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--rates", nargs="*", type=float)
    parser.add_argument("--new", type=int)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=["shaped", "demo"])
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.batches = args.batches or ([1, 16] if args.quick else [1, 8, 16])
    args.rates = args.rates or ([0.8] if args.quick else [0.6, 0.8])
    args.new = args.new or (NEW // 2 if args.quick else NEW)
    cuda = args.device != "cpu"
    card = torch.cuda.get_device_name() if cuda else "a CPU"
    result: dict[str, Any] = {
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "turns": args.turns,
        "new": args.new,
        "rows": [],
    }
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"speculative-{card.replace(' ', '-')}"
    for name in args.models:
        if name == "demo" and find_spec("transformers") is None:
            print("the demo model needs transformers, which is missing", flush=True)
            continue
        for row in demo_rows(args) if name == "demo" else shaped_rows(args):
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
            (args.out / f"{stem}.md").write_text(table(result))
            if time.perf_counter() - started > args.seconds:
                print(f"{args.seconds:.0f} s are over", flush=True)
                return


if __name__ == "__main__":
    main()
