"""Held-out perplexity of the demo model by what its cache keeps: policies, budgets, contexts.

    python bench/eviction_quality.py      # bench/results/eviction_quality.{json,md,png}

Of each window all but the last tokens are a prompt, fed in one step; the last ones go through the
cache one by one, as if they had been generated, and are scored. All rows of one context score the
same tokens. The model, in bf16, was trained on windows of 2,048. Rotated sinks take no long prompt:
there all tokens behind the budget go one by one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effllm import demo
from effllm.cache import H2O, TOVA, CachePolicy, Full, SnapKV, StreamingLLM
from effllm.generation.paged_model import PagedModel, effllm_attention, fitting_cache

RESULTS = Path(__file__).parent / "results"
TRAINED, SINKS = 2048, 4
CONTEXTS = (512, 2048, 4096)
WINDOWS, WINDOWS_BEYOND = 8, 4  # tokens beyond the trained length take long
PERCENT = (50, 20, 10)
POLICIES: dict[str, Callable[[int], CachePolicy]] = {
    "window": lambda budget: StreamingLLM(0, budget),
    "StreamingLLM": lambda budget: StreamingLLM(SINKS, budget - SINKS),
    "StreamingLLM, rotated": lambda budget: StreamingLLM(SINKS, budget - SINKS, rotate=True),
    "H2O": lambda budget: H2O(budget, budget // 2),
    "H2O, normalized": lambda budget: H2O(budget, budget // 2, normalize=True),
    "TOVA": TOVA,
    "SnapKV": lambda budget: SnapKV(budget, min(32, budget // 2)),
}


@torch.inference_mode()
def score(model: Any, windows: Tensor, policy: CachePolicy, scored: int) -> tuple[float, int]:
    """Mean nats of the last ``scored`` tokens of windows [W, T], and the bytes of keys and values
    that are kept of one window at the end."""
    rows, context = windows.shape
    prompt = context - scored
    if policy.rotates:
        prompt = min(prompt, policy.slots or prompt)
    need = policy.needed(prompt, context - prompt)
    cache = fitting_cache(model, [need] * rows, policy=policy)
    paged, seqs = PagedModel(model, cache), [cache.add() for _ in range(rows)]
    total, begin = 0.0, 0
    with effllm_attention(model):
        for end in range(prompt, context):
            fed = windows[:, begin:end].tolist()
            logits = paged.step(list(zip(seqs, fed, strict=True))).logits
            if end >= context - scored:
                total += F.cross_entropy(logits.float(), windows[:, end], reduction="sum").item()
            begin = end
    pages = len(cache.pages(seqs[0]))
    return total / (rows * scored), pages * sum(t[0].nbytes for t in (*cache.k, *cache.v))


def table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# Quality of caches that evict",
        "",
        f"Perplexity of the demo model (bf16, trained on windows of {TRAINED:,}) over the last "
        f"{result['scored']} tokens",
        f"of {WINDOWS} held-out windows, of {WINDOWS_BEYOND} where they are longer than that, "
        "decoded one by one through the cache behind",
        "a prompt of all tokens before them;",
        "budgets are in percent of the window, MB those of the keys and values of one window at "
        "the end.",
        "A prompt is attended to as a whole and then evicted from, but for a window and "
        "StreamingLLM, whose tokens see in it",
        "what they would see while decoding. Half of H2O's budget are the last tokens; "
        f"StreamingLLM has {SINKS} sinks; SnapKV keeps all",
        "that comes behind the prompt.",
        f"Made by `bench/eviction_quality.py` with torch {result['torch']} on a CPU.",
        "",
        "![perplexity by budget](eviction_quality.png)",
    ]
    for context in sorted({r["context"] for r in result["rows"]}):
        rows = [r for r in result["rows"] if r["context"] == context]
        budgets = sorted({r["percent"] for r in rows if r["percent"] < 100}, reverse=True)
        (full,) = (r for r in rows if r["percent"] == 100)
        note = "" if context <= TRAINED else ", beyond what the model was trained on"
        lines += [
            "",
            f"## Windows of {context:,}{note}",
            "",
            "| policy | " + " | ".join(f"{p} %" for p in budgets) + " | MB |",
            "|---|" + "---:|" * (len(budgets) + 1),
            f"| full cache | {full['perplexity']:.2f} |"
            + " |" * (len(budgets) - 1)
            + f" {full['bytes'] / 1e6:.2f} |",
        ]
        for name in dict.fromkeys(r["policy"] for r in rows if r["percent"] < 100):
            ours = {r["percent"]: r for r in rows if r["policy"] == name}
            lines.append(
                f"| {name} | "
                + " | ".join(f"{ours[p]['perplexity']:.2f}" if p in ours else "" for p in budgets)
                + " | "
                + ", ".join(f"{ours[p]['bytes'] / 1e6:.2f}" for p in budgets if p in ours)
                + " |"
            )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity by budget, an axis for each context."""
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(CONTEXTS), figsize=(14, 4.5), layout="constrained", squeeze=False
    )
    for axes, context in zip(all_axes[0], CONTEXTS, strict=True):
        rows = [r for r in result["rows"] if r["context"] == context]
        (full,) = (r["perplexity"] for r in rows if r["percent"] == 100)
        for index, name in enumerate(POLICIES):
            ours = sorted((r["percent"], r["perplexity"]) for r in rows if r["policy"] == name)
            axes.plot(*zip(*ours, strict=True), "o-", color=f"C{index}", linewidth=1, label=name)
        axes.axhline(full, color="0.3", linestyle="--", linewidth=1, label="full cache")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(PERCENT, [f"{p} %" for p in PERCENT])
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3, which="both")
        axes.set_title(f"windows of {context:,}")
        axes.set_xlabel("budget, percent of the window")
    all_axes[0, 0].set_ylabel("held-out perplexity")
    all_axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, and writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scored", type=int, default=128, help="tokens of a window")
    parser.add_argument("--only", type=int, help="a context; rows of others stay as they are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, tokenizer = demo.load()
    result: dict[str, Any] = {
        "scored": args.scored,
        "torch": torch.__version__,
        "rows": [],
    }
    if args.only is not None:
        before = json.loads((args.out / "eviction_quality.json").read_text())
        if any(before[key] != value for key, value in result.items() if key != "rows"):
            raise ValueError(f"{args.out}/eviction_quality.json is of other tokens or torch")
        result["rows"] = [row for row in before["rows"] if row["context"] != args.only]
    for context in CONTEXTS if args.only is None else [args.only]:
        limit = context * (WINDOWS if context <= TRAINED else WINDOWS_BEYOND)
        windows = demo.held_out_tokens(tokenizer, context=context, limit=limit)
        runs: list[tuple[str, int, CachePolicy]] = [("full cache", 100, Full())]
        for name, make in POLICIES.items():
            runs += [(name, p, make(context * p // 100)) for p in PERCENT]
        for name, percent, policy in runs:
            nll, size = score(model, windows, policy, args.scored)
            row = {"context": context, "policy": name, "percent": percent}
            result["rows"].append(row | {"perplexity": round(math.exp(nll), 4), "bytes": size})
            print(json.dumps(result["rows"][-1]), flush=True)
    (args.out / "eviction_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "eviction_quality.md").write_text(table(result))
    plot(result, args.out / "eviction_quality.png")


if __name__ == "__main__":
    main()
