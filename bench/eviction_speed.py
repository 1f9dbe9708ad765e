"""What a budget of 4096 tokens costs and saves beside a full cache of 32768: time and memory.

    python bench/eviction_speed.py            # bench/results/eviction_speed-<card>.{json,md}
    python bench/eviction_speed.py --device cpu --shape tiny    # does it run?

Rows are the steps of one attention layer of the shape of Llama 3.1 8B in bf16, append and
attention, at the end of texts of so many tokens: layers take turns, as many as fit, so that the L2
cache is cold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_shaped
import torch
from torch import Tensor

from effllm import ops
from effllm.cache import H2O, CachePolicy, EvictingKVCache, Full, PagedKVCache
from effllm.testing.timing import time_calls

RESULTS = Path(__file__).parent / "results"
MAX_BYTES = 20 * 10**9
"""Bounds the caches of all layers of a row."""
TURN_BYTES = 200 * 10**6
"""What the layers of a row should read in turn: four times the L2 cache of an H100."""


@dataclass(frozen=True)
class Plan:
    """The texts, and the model whose attention it is."""

    shape: llama_shaped.Shape
    device: str
    prompt: int
    text: int
    budget: int
    page_size: int = 16

    @property
    def policies(self) -> dict[str, CachePolicy]:
        """By the names of rows."""
        return {"full": Full(), "h2o": H2O(self.budget, self.budget // 2, 4)}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def peak_bytes(device: str) -> int:
    """Most that was allocated since the last call."""
    if device == "cpu":
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def cache_of(plan: Plan, policy: CachePolicy, layers: int, batch: int) -> PagedKVCache:
    """Room for a prompt and what is decoded up to the text's end."""
    heads, dim = plan.shape.num_key_value_heads, plan.shape.head_dim
    options: dict[str, Any] = {
        "max_batch": batch,
        "max_seq_len": policy.needed(plan.prompt, plan.text - plan.prompt),
        "page_size": plan.page_size,
        "dtype": plan.dtype,
        "device": plan.device,
    }
    if policy.slots is None:
        return PagedKVCache(layers, heads, dim, **options)
    return EvictingKVCache(policy, layers, heads, dim, **options)


def layer_steps(
    plan: Plan, policy: CachePolicy, cache: PagedKVCache, batch: int
) -> list[Callable[[], Tensor]]:
    """A step of each layer, all sequences at the end of their texts."""
    shape, device = plan.shape, plan.device
    heads, slots = shape.num_key_value_heads, min(plan.text, cache.max_seq_len)
    pages = torch.arange(cache.page_table.numel(), dtype=torch.int32, device=device) + 1
    table = pages.view_as(cache.page_table)
    lengths = torch.full((batch,), slots, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    positions = torch.full((batch,), plan.text - 1, device=device)
    last = (slots - 1) // plan.page_size, (slots - 1) % plan.page_size
    mapping = table[:, last[0]].long() * plan.page_size + last[1]

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=plan.dtype, device=device)

    def full(layer: int) -> Callable[[], Tensor]:
        k_cache, v_cache, _, _ = cache.layer(layer)

        def step() -> Tensor:
            ops.kv_append(k, v, k_cache, v_cache, mapping)
            tables = (table, lengths, starts)
            return ops.paged_attention(q, k_cache, v_cache, *tables, max_seqlen_q=1)[0]

        return step

    def evicting(layer: int) -> Callable[[], Tensor]:
        k_cache, v_cache, _, _ = cache.layer(layer)
        used = lengths[:, None].repeat(1, heads)
        scores = torch.rand(batch, heads, slots, device=device)
        slot_pos = torch.argsort(scores, -1).int()
        by_head = table[:, None].expand(-1, heads, -1)
        rule = {"recent": policy.protected, "n_sink": policy.n_sink}

        def step() -> Tensor:
            caches = (k_cache, v_cache)
            ops.h2o_append(k, v, *caches, scores, slot_pos, used, by_head, positions, **rule)
            return ops.h2o_attention(q, *caches, scores, table, lengths)[0]

        return step

    q = random(batch, shape.num_attention_heads, shape.head_dim)
    k, v = (random(batch, heads, shape.head_dim) for _ in range(2))
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    return [(full if policy.slots is None else evicting)(i) for i in range(cache.num_layers)]


def layer_row(plan: Plan, name: str, batch: int) -> dict[str, Any]:
    """Microseconds of a layer's step; bytes of a layer's pages, and of all it keeps."""
    policy, shape = plan.policies[name], plan.shape
    slots = policy.needed(plan.prompt, plan.text - plan.prompt)
    of_layer = 2 * batch * slots * shape.num_key_value_heads * shape.head_dim * plan.dtype.itemsize
    layers = max(1, min(-(-TURN_BYTES // of_layer), MAX_BYTES // of_layer))
    layers = min(layers, shape.num_hidden_layers)
    peak_bytes(plan.device)
    cache = cache_of(plan, policy, layers, batch)
    calls = layer_steps(plan, policy, cache, batch)
    us = time_calls(calls, plan.device).us
    return {
        "cache": name,
        "batch": batch,
        "slots": slots,
        "us": round(us, 2),
        "page_mb": round(of_layer / 1e6, 1),
        "peak_mb": round(peak_bytes(plan.device) / layers / 1e6, 1),
        "layers": layers,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown of all rows: full caches, and limited ones beside them."""
    lines = [
        f"# A budget of {result['budget']} tokens beside a full cache of {result['text']}",
        "",
        f"{result['card']}, torch {result['torch']}, by `bench/eviction_speed.py`: a step of one "
        "attention layer, append and attention, and its memory: pages in use, and the most that "
        f"was allocated. Caches have room for a prompt of {result['prompt']} tokens and what is "
        "decoded behind it.",
        "",
        "| batch | full | H2O | x | pages, full | H2O | peak, full | H2O |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {(row["batch"], row["cache"]): row for row in result["rows"]}
    for batch in dict.fromkeys(batch for batch, _ in found):
        full, h2o = found[batch, "full"], found.get((batch, "h2o"))
        if h2o is not None:
            lines.append(
                f"| {batch} | {full['us']} us | {h2o['us']} us | {full['us'] / h2o['us']:.2f} "
                f"| {full['page_mb']} MB | {h2o['page_mb']} MB "
                f"| {full['peak_mb']} MB | {h2o['peak_mb']} MB |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes the two files after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.shape == "tiny":
        plan = Plan(llama_shaped.TINY, args.device, 32, 128, 32)
    else:
        plan = Plan(llama_shaped.LLAMA_8B, args.device, 4096, 32768, 4096)
    card = "a CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    result: dict[str, Any] = {
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "prompt": plan.prompt,
        "text": plan.text,
        "budget": plan.budget,
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"eviction_speed-{card.replace(' ', '-')}"

    def add(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(result))

    for batch in args.batches:
        for name in plan.policies:
            add(layer_row(plan, name, batch))


if __name__ == "__main__":
    main()
