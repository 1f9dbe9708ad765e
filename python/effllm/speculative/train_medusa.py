"""Trains Medusa heads for a model: python -m effllm.speculative.train_medusa --out FOLDER.

Without arguments for the demo model, on the text it was trained on. The model stays as it is
(Medusa-1): a head learns the model's own distribution of the token that it is for, given the
text up to there. 1000 steps take some 15 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm import demo
from effllm.demo.corpus import END_OF_TEXT, training_corpus
from effllm.speculative import MedusaHeads

SEED = 1234


def windows_of(tokens: Tensor, length: int, count: int) -> Iterator[Tensor]:
    """``count`` windows [length] from random places of tokens [T], always the same."""
    generator = torch.Generator().manual_seed(SEED)
    for start in torch.randint(len(tokens) - length + 1, (count,), generator=generator).tolist():
        yield tokens[start : start + length]


@torch.no_grad()
def states(model: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, T, D] and log probabilities [B, T, V] of windows [B, T]."""
    hidden = model.model(windows, use_cache=False).last_hidden_state
    return hidden, model.lm_head(hidden).float().log_softmax(-1)


def head_losses(model: Any, heads: MedusaHeads, hidden: Tensor, log_probs: Tensor) -> Tensor:
    """Cross entropy of each head to the model's distribution, over all places that have one."""
    losses = []
    for k, logits in enumerate(heads(hidden, model.lm_head), start=1):
        predicted = logits[:, :-k].float().log_softmax(-1)
        losses.append(-(log_probs[:, k:].exp() * predicted).sum(-1).mean())
    return torch.stack(losses)


def train(
    model: Any,
    heads: MedusaHeads,
    tokens: Tensor,
    *,
    steps: int,
    batch: int = 4,
    length: int = 512,
    learning_rate: float = 2e-3,
) -> list[dict[str, Any]]:
    """Trains the heads in place with AdamW, the rate falling to zero as a cosine.

    Args:
        model: a transformers causal model in evaluation mode, which is not changed.
        tokens: int64 [T], the text.
        batch, length: windows in a step, and tokens in each.

    Returns:
        Some 20 rows of step and losses, one per head.
    """
    optimizer = torch.optim.AdamW(heads.parameters(), learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    device = next(heads.parameters()).device
    windows = windows_of(tokens, length, steps * batch)
    curve = []
    for step in range(steps):
        ids = torch.stack([next(windows) for _ in range(batch)]).to(device)
        losses = head_losses(model, heads, *states(model, ids))
        optimizer.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 20) == 0:
            curve.append({"step": step + 1, "losses": [round(x, 4) for x in losses.tolist()]})
            print(curve[-1], flush=True)
    return curve


@torch.no_grad()
def accuracy(model: Any, heads: MedusaHeads, windows: Tensor, top: int = 1) -> list[float]:
    """How often a token of each head's ``top`` is the one that the model finds likeliest there."""
    hits = torch.zeros(len(heads))
    for ids in windows.split(4):
        hidden, log_probs = states(model, ids.to(next(heads.parameters()).device))
        chosen = log_probs.argmax(-1)
        for k, logits in enumerate(heads(hidden, model.lm_head), start=1):
            candidates = logits[:, :-k].topk(top).indices
            found = (candidates == chosen[:, k:, None]).any(-1)
            hits[k - 1] += found.float().mean().item() * len(ids) / len(windows)
    return hits.tolist()


@torch.no_grad()
def tokens_per_step(
    model: Any, heads: MedusaHeads, prompts: Tensor, new_tokens: int = 64, **tree: int
) -> float:
    """Tokens that a pass of the model would give with these drafts, where 1 is none of them right.

    The greedy text is generated first, and the trees are then held against it: the root, which the
    model itself has chosen, and what follows it for as long as the tree has it.

    Args:
        prompts: int64 [B, T].
        tree: options of `MedusaHeads.draft`.
    """
    length = prompts.shape[1] + new_tokens
    text = model.generate(prompts, do_sample=False, max_length=length, min_length=length)
    hidden = states(model, text)[0]
    steps = 0
    for row, tokens in zip(hidden, text.tolist(), strict=True):
        position = prompts.shape[1] - 1
        while position + 1 < length:
            (drafted,) = heads.draft(
                row[position : position + 1],
                [tokens[position + 1]],
                model.lm_head,
                **tree,
            )
            children = {
                (parent, token): node
                for node, (parent, token) in enumerate(
                    zip(drafted.parents, drafted.tokens, strict=True)
                )
            }
            node = 0
            position += 1
            while position + 1 < length and (node, tokens[position + 1]) in children:
                node = children[node, tokens[position + 1]]
                position += 1
            steps += 1
    return len(prompts) * new_tokens / steps


def demo_text(tokenizer: Any) -> Tensor:
    """The demo model's training text, int64 [T]."""
    texts = [text + END_OF_TEXT for text in training_corpus().files.values()]
    # The tokenizer inside: the transformers wrapper would warn of texts beyond the context.
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains Medusa heads for a model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the heads")
    parser.add_argument("--model", type=Path, default=demo.model_path(), help="transformers folder")
    parser.add_argument("--text", type=Path, help="UTF-8 file (default: the demo's training text)")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1, help="residual blocks in a head")
    parser.add_argument("--tied", action="store_true", help="heads that end in the model's head")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    start = time.monotonic()
    torch.manual_seed(SEED)
    model, tokenizer = demo.load(options.model, device=options.device, dtype=torch.float32)
    if options.text is None:
        tokens = demo_text(tokenizer)
    else:
        tokens = tokenizer(options.text.read_text("utf-8"), return_tensors="pt").input_ids[0]
    vocab_size, hidden_size = model.lm_head.weight.shape
    heads = MedusaHeads(
        hidden_size,
        vocab_size,
        num_heads=options.heads,
        num_layers=options.layers,
        tied=options.tied,
        lm_head=model.lm_head.weight,
    ).to(options.device)
    model.requires_grad_(False)
    record: dict[str, Any] = {"steps": options.steps, "training_tokens": len(tokens)}
    record["curve"] = train(model, heads, tokens, steps=options.steps)
    heads.to(torch.bfloat16).save_pretrained(options.out)
    heads.float()
    held_out = demo.held_out_tokens(tokenizer, limit=32768)
    for top in (1, 4):
        record[f"held_out_top{top}"] = [round(x, 4) for x in accuracy(model, heads, held_out, top)]
    prompts = held_out[:, :128].to(options.device)
    for nodes in (1 + options.heads, 16, 64):
        rate = tokens_per_step(model, heads, prompts, max_nodes=nodes)
        record[f"tokens_per_step_{nodes}_nodes"] = round(rate, 3)
    record |= {"minutes": round((time.monotonic() - start) / 60, 1), "torch": torch.__version__}
    (options.out / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__":
    main()
