"""Tokens per second of the demo model with drafts and without, and whether its text stays the same.

    python bench/speculative.py           # bench/results/speculative.{json,md}, in some minutes

Plain decoding and every draft take turns in the same run; each speed is of the fastest turn. "wide"
is the demo model with an MLP so wide, of zeros, that its weights exceed any cache: it says the
same, at the cost of a large model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effllm
from effllm import demo
from effllm.speculative import MedusaDraft, MedusaHeads, ModelDraft, NGramDraft

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, WIDTH = 32, 48, 32768


def widen(model: Any, width: int) -> None:
    """In place: zero rows of gate and up, zero columns of down."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == model.config.intermediate_size:
            more = width - layer.out_features
            layer.weight = nn.Parameter(nn.functional.pad(layer.weight, (0, 0, 0, more)), False)
            layer.out_features = width
        elif isinstance(layer, nn.Linear) and layer.in_features == model.config.intermediate_size:
            more = width - layer.in_features
            layer.weight = nn.Parameter(nn.functional.pad(layer.weight, (0, more)), False)
            layer.in_features = width


def targets() -> Iterator[tuple[str, Any]]:
    """Names for the table, and models."""
    for name in ("wide, bf16", "wide, int4", "bf16", "int4"):
        model, _ = demo.load()
        if name.startswith("wide"):
            widen(model, WIDTH)
        if name.endswith("int4"):
            effllm.quantize_(model, effllm.Int4Config(group_size=64), progress=False)
        yield name, model


def drafts(device: str = "cpu", graphs: bool | None = None) -> list[tuple[str, Any, int]]:
    """Names for the table, drafts, and nodes of their trees."""
    small, _ = demo.load(demo.draft_path(), device=device)
    heads = MedusaHeads.from_pretrained(demo.medusa_path(), device=device, dtype=torch.bfloat16)
    return [
        ("none", None, 8),
        ("n-gram, chains of 5", NGramDraft(max_draft=4), 5),
        ("n-gram, trees of 12", NGramDraft(max_draft=4), 12),
        ("draft model, chains of 4", ModelDraft(small, depth=3, cuda_graphs=graphs), 4),
        (
            "draft model, trees of 8",
            ModelDraft(small, depth=3, candidates=3, cuda_graphs=graphs),
            8,
        ),
        ("Medusa heads, chains of 3", MedusaDraft(heads, candidates=1), 3),
        ("Medusa heads, trees of 8", MedusaDraft(heads), 8),
    ]


def spread(tokens: Tensor, count: int) -> list[list[int]]:
    """Prompts from all over the held-out text."""
    return tokens.unfold(0, PROMPT, len(tokens) // count)[:count].tolist()


def generate(model: Any, prompts: list[list[int]], batch: int, **options: Any) -> list[Any]:
    """All prompts, so many at a time."""
    results = []
    for first in range(0, len(prompts), batch):
        results += effllm.generate(model, prompts[first : first + batch], stop_tokens=(), **options)
    return results


def measure(
    name: str, model: Any, kinds: list[tuple[str, Any, int]], prompts: list[list[int]],
    batch: int, temperature: float | None, turns: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each draft."""
    options = {"max_new_tokens": NEW, "temperature": temperature}
    best, texts, steps = {}, {}, {}
    for _ in range(turns):
        for kind, draft, nodes in kinds:
            started = time.perf_counter()
            results = generate(model, prompts, batch, draft=draft, tree=nodes, **options)
            seconds = time.perf_counter() - started
            best[kind] = min(seconds, best.get(kind, seconds))
            texts[kind] = [result.tokens for result in results]
            steps[kind] = sum(result.steps for result in results)
    total = len(prompts) * NEW
    for kind, _, _ in kinds:
        yield {
            "target": name,
            "batch": batch,
            "mode": "sampled" if temperature else "greedy",
            "draft": kind,
            "tokens_per_s": round(total / best[kind], 1),
            "speedup": round(best["none"] / best[kind], 3),
            "tokens_per_step": round(total / steps[kind], 3),
            "prompts": len(prompts),
            "equal_texts": sum(a == b for a, b in zip(texts[kind], texts["none"], strict=True)),
        }


def table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# Speculative decoding of the demo model",
        "",
        f"{NEW} new tokens after held-out prompts of {PROMPT}; speeds of the fastest of "
        f"{result['turns']} turns, in which all drafts follow one another. Sampled at temperature "
        f"{result['temperature']}. *Wide* is the same model with an MLP of {WIDTH:,} instead of",
        f"640, of zeros ({result['wide_bytes'] / 1e6:.0f} MB in bf16 where this CPU caches 32 MB):",
        "the text of the small model at the cost of a large one. Chains and trees count nodes, the",
        "last certain token included; tokens per step are of each prompt, its first step included.",
        f"Made by `bench/speculative.py` with torch {result['torch']} on one thread of a CPU with",
        "nothing else to do.",
    ]
    for target in dict.fromkeys(row["target"] for row in result["rows"]):
        for batch in (1, 16):
            rows = [r for r in result["rows"] if (r["target"], r["batch"]) == (target, batch)]
            if not rows:
                continue
            lines += [
                "",
                f"## {target}, batch {batch}",
                "",
                "| draft | greedy: tokens/s | x plain | tokens/step | equal texts "
                "| sampled: tokens/s | x plain | tokens/step |",
                "|---|---:|---:|---:|---:|---:|---:|---:|",
            ]
            sampled = {r["draft"]: r for r in rows if r["mode"] == "sampled"}
            for r in (row for row in rows if row["mode"] == "greedy"):
                s = sampled[r["draft"]]
                lines.append(
                    f"| {r['draft']} | {r['tokens_per_s']:.1f} | {r['speedup']:.2f} "
                    f"| {r['tokens_per_step']:.2f} | {r['equal_texts']} of {r['prompts']} "
                    f"| {s['tokens_per_s']:.1f} | {s['speedup']:.2f} | {s['tokens_per_step']:.2f} |"
                )
    lines += [
        "",
        "## Greedy text of 200 held-out prompts",
        "",
        "Of 24 tokens each, 16 prompts at a time: how many are token for token what plain decoding",
        "says.",
        "",
        "| target | draft | equal texts | tokens/step |",
        "|---|---|---:|---:|",
    ]
    lines += [
        f"| {r['target']} | {r['draft']} | {r['equal_texts']} | {r['tokens_per_step']:.2f} |"
        for r in result["lossless"]
    ]
    return "\n".join(lines) + "\n"


def lossless(name: str, model: Any, prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    """Greedy texts of many prompts against plain ones."""
    plain = generate(model, prompts, 16, max_new_tokens=24)
    for kind, draft, nodes in drafts()[1:]:
        results = generate(model, prompts, 16, max_new_tokens=24, draft=draft, tree=nodes)
        yield {
            "target": name,
            "draft": kind,
            "equal_texts": sum(a.tokens == b.tokens for a, b in zip(results, plain, strict=True)),
            "tokens_per_step": round(24 * len(prompts) / sum(r.steps for r in results), 3),
        }


def main() -> None:
    """Measures, and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--prompts", type=int, default=200, help="of the comparison of texts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, tokenizer = demo.load(demo.draft_path())
    held_out = demo.held_out_tokens(tokenizer).flatten()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "turns": args.turns,
        "temperature": args.temperature,
        "rows": [],
        "lossless": [],
    }
    kinds = drafts()
    for name, model in targets():
        wide = name.startswith("wide")
        if wide:
            result["wide_bytes"] = result.get("wide_bytes") or sum(
                parameter.nbytes for parameter in model.parameters()
            )
        else:
            for row in lossless(name, model, spread(held_out, args.prompts)):
                result["lossless"].append(row)
                print(json.dumps(row), flush=True)
        for batch in (1,) if wide else (1, 16):
            prompts = spread(held_out, 16 if batch == 16 else 4)
            for temperature in (None, args.temperature):
                rows = measure(name, model, kinds, prompts, batch, temperature, args.turns)
                for row in rows:
                    result["rows"].append(row)
                    print(json.dumps(row), flush=True)
        (args.out / "speculative.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "speculative.md").write_text(table(result))


if __name__ == "__main__":
    main()
