"""Held-out perplexity of the demo model by the dtype that its keys and values are kept in.

    python bench/kv_quality.py            # bench/results/kv_quality.{json,md}, in a few minutes

Every key and value goes through the cache, those of the token that is scored included. The model is
in bf16.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effllm import demo
from effllm.integrations.transformers import PagedCache

RESULTS = Path(__file__).parent / "results"
CONTEXT = 512


def table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# Quality of quantised KV caches",
        "",
        f"Perplexity of the demo model (bf16, D = {result['head_dim']}) over "
        f"{result['held_out_tokens']:,} held-out tokens in windows of {CONTEXT}; bytes of one key",
        "or value of one head, its scale included.",
        f"Made by `bench/kv_quality.py` with torch {result['torch']} on a CPU.",
        "",
        "| kv_dtype | perplexity | over bf16 | bytes |",
        "|---|---:|---:|---:|",
    ]
    exact = result["rows"][0]["perplexity"]
    lines += [
        f"| {r['kv_dtype']} | {r['perplexity']:.4f} | {100 * (r['perplexity'] / exact - 1):+.2f} % "
        f"| {r['bytes']} |"
        for r in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, tokenizer = demo.load()
    held_out = demo.held_out_tokens(tokenizer, context=CONTEXT, limit=args.eval_tokens)
    model.set_attn_implementation("effllm")
    dim = model.config.head_dim
    result: dict[str, Any] = {
        "held_out_tokens": held_out.numel(),
        "head_dim": dim,
        "torch": torch.__version__,
        "rows": [],
    }
    row_bytes = {"bf16": 2 * dim, "e4m3": dim + 4, "int8": dim + 4, "int4": dim // 2 + 4}
    for name, count in row_bytes.items():
        kv_dtype = None if name == "bf16" else name
        cache = partial(PagedCache, model.config, max_seq_len=CONTEXT, kv_dtype=kv_dtype)
        value = demo.perplexity(model, held_out, batch_size=4, make_cache=cache)
        result["rows"].append({"kv_dtype": name, "perplexity": round(value, 4), "bytes": count})
        print(json.dumps(result["rows"][-1]), flush=True)
    (args.out / "kv_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "kv_quality.md").write_text(table(result))


if __name__ == "__main__":
    main()
