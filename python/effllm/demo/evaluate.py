"""Judges causal language models over fixed windows of tokens: perplexity, int4 cost, a draft."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def mean_nll(
    model: Any,
    windows: torch.Tensor,
    *,
    batch_size: int = 8,
    make_cache: Callable[[], Any] | None = None,
) -> float:
    """Mean negative log-likelihood in nats per predicted token.

    `windows` is int64 [W, T]; each window is scored on its own, so T - 1 tokens per window count.
    `model(ids)` returns an object with `logits` [B, T, V], as `transformers` models do. The model
    is put in evaluation mode and left so. Logits are reduced in fp32, the mean in fp64.
    `make_cache` gives the `past_key_values` of each batch, through which keys and values then go.
    """
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for ids in windows.split(batch_size):
        ids = ids.to(device)
        cached = {} if make_cache is None else {"past_key_values": make_cache()}
        logits = model(ids, use_cache=bool(cached), **cached).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += loss.double().sum().item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def perplexity(model: Any, windows: torch.Tensor, **options: Any) -> float:
    """`exp(mean_nll(...))`; arguments as there."""
    return math.exp(mean_nll(model, windows, **options))


@torch.no_grad()
def fake_quantise(model: Any, group: int = 64) -> Any:
    """Copy whose decoder linears hold weights rounded to symmetric int4, the head left alone."""
    model = copy.deepcopy(model)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            grouped = module.weight.float().unflatten(1, (-1, group))
            scale = grouped.abs().amax(-1, keepdim=True) / 7.5
            codes = (grouped / scale + 8).round().clamp(0, 15)
            module.weight.copy_(((codes - 8) * scale).flatten(1))
    return model


@torch.no_grad()
def with_outliers(model: Any, factor: float, channels: int = 4) -> Any:
    """Copy that computes the same, with some channels after each norm `factor` times as large.

    The columns that they meet shrink as much. Large models have such channels; small ones must be
    given them, to show what they do to quantisation.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, linears in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            chosen = torch.randperm(len(norm.weight), generator=generator)[:channels]
            norm.weight[chosen] *= factor
            for linear in linears:
                linear.weight[:, chosen] /= factor
    return model


@torch.no_grad()
def acceptance(model: nn.Module, draft: nn.Module, windows: torch.Tensor) -> dict[str, float]:
    """How well the draft predicts the model: what speculative sampling accepts per token."""
    overlap, same = [], []
    for ids in windows.split(4):
        p = model(ids, use_cache=False).logits.float().softmax(-1)
        q = draft(ids, use_cache=False).logits.float().softmax(-1)
        overlap.append(torch.minimum(p, q).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
    return {
        "sampled": torch.cat(overlap).mean().item(),
        "greedy": torch.cat(same).mean().item(),
    }
