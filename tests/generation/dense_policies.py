"""Policies of eviction as their papers define them, in plain PyTorch and float64: a model of
transformers with the whole matrix of attention weights, in which what was evicted is masked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import using
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

_names = itertools.count()


@dataclass
class Layer:
    """Nothing is ever thrown away: all tokens [HKV, N], and which are kept."""

    kept: Tensor = field(default_factory=lambda: torch.ones(0, 0, dtype=torch.bool))
    scores: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    weights: Tensor | None = None  # [HQ, n, N] of the last step


@dataclass
class DensePolicy:
    """One sequence of one model. ``kind`` is h2o, streaming, rotated, snap or tova."""

    model: Any
    kind: str
    budget: int
    recent: int = 1
    n_sink: int = 0
    normalize: bool = False
    kernel: int = 7
    pooling: str = "max"
    smallest_gap: float = float("inf")
    """Between the scores of who went and who was next, relative: how sure the choices are."""
    follows: list[list[set[int]]] | None = None
    """What each head of each layer is to keep of the step that is fed: others chose."""
    largest_regret: float = 0.0
    """By how much the score of who went was above the lowest, relative: how bad their choices."""

    def __post_init__(self) -> None:
        self.layers = [Layer() for _ in range(self.model.config.num_hidden_layers)]
        self.cache = DynamicCache(config=self.model.config)
        self.name = f"dense-policy-{next(_names)}"
        self.inv_freq = self.model.model.rotary_emb.inv_freq.double()
        AttentionInterface.register(self.name, self.attention)
        AttentionMaskInterface.register(self.name, lambda *args, **kwargs: None)

    def feed(self, tokens: list[int]) -> Tensor:
        """Logits [n, V] after each of the next tokens: a prompt, or one token of decoding."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.name)
        with torch.no_grad():
            out = self.model(torch.tensor([tokens]), **using(self.model, self.cache))
        self.model.set_attn_implementation(before)
        logits: Tensor = out.logits[0]
        return logits

    def kept(self, layer: int, head: int) -> set[int]:
        return set(self.layers[layer].kept[head].nonzero().flatten().tolist())

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = self.layers[module.layer_idx]
        q, k, v = query[0].double(), key[0].double(), value[0].double()
        (heads, total, dim), n = k.shape, q.shape[1]
        new = torch.ones(heads, n, dtype=torch.bool)
        layer.kept = torch.cat([layer.kept.view(heads, -1), new], 1)
        layer.scores = torch.cat([layer.scores.view(heads, -1), new.double() * 0], 1)
        wanted = None if self.follows is None else self.follows[module.layer_idx]
        if n == 1 and self.kind != "snap":
            self.evict(layer, wanted, now=total - 1)

        at, token = torch.arange(total - n, total), torch.arange(total)
        sees = layer.kept[:, None] & (token <= at[:, None])
        if n > 1 and self.kind == "streaming":
            sees = sees & ((token < self.n_sink) | (token > at[:, None] - self.recent))
        grouped = q.view(heads, -1, n, dim)
        if self.kind == "rotated":  # by the place among what is kept, not in the text
            place = layer.kept[0].cumsum(0) - 1
            k = self.turn(k, place - token)
            grouped = self.turn(grouped, (place - token)[-n:])
        logits = grouped @ k[:, None].mT * scaling
        weights = logits.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
        layer.weights = weights.flatten(0, 1)

        of_keys = weights.sum(1)  # over the group: [HKV, n, N]
        if self.kind == "h2o":
            layer.scores += of_keys.sum(1)
        elif self.kind == "tova":
            layer.scores = of_keys[:, -1].sum(0, keepdim=True).expand(heads, -1)
        if n > 1 and self.kind == "snap":
            self.snap(layer, of_keys[:, -self.recent :].sum(1))
        elif n > 1:
            self.evict(layer, wanted, now=total - 1, seen=total)
        out = (weights @ v[:, None]).flatten(0, 1)
        return out.transpose(0, 1)[None].to(query.dtype), None

    def evict(
        self, layer: Layer, wanted: list[set[int]] | None, now: int, seen: int | None = None
    ) -> None:
        """One token after the other, as long as there are too many; only such as others want gone,
        if ``wanted`` says what they kept."""
        for head, kept in enumerate(layer.kept):
            while kept.sum() > self.budget:
                rank = []
                for token in kept.nonzero().flatten().tolist():
                    if self.n_sink <= token <= now - self.recent:
                        score = layer.scores[head, token].item()
                        if self.normalize:
                            score /= (seen or now) - token
                        rank.append((score, token))
                (least, goes), *others = sorted(rank)
                if wanted is not None:
                    score, goes = min(entry for entry in rank if entry[1] not in wanted[head])
                    self.largest_regret = max(self.largest_regret, (score - least) / least)
                elif others and others[0][0] > 0:
                    gap = (others[0][0] - least) / others[0][0]
                    self.smallest_gap = min(self.smallest_gap, gap)
                kept[goes] = False

    def snap(self, layer: Layer, votes: Tensor) -> None:
        """Of the votes of the last queries [HKV, N], pooled over what each head holds."""
        for head, kept in enumerate(layer.kept):
            held = kept.nonzero().flatten()
            if len(held) <= self.budget:
                continue
            past, window = held[: -self.recent], held[-self.recent :]
            half = self.kernel // 2
            padded = F.pad(votes[head, past], (half, half), value=0.0)  # votes are not negative
            windows = padded.unfold(0, self.kernel, 1)
            pooled = windows.amax(1) if self.pooling == "max" else windows.mean(1)
            # Of equal votes, as neighbours have them after pooling, the later tokens stay.
            order = sorted(range(len(past)), key=lambda i: (round(pooled[i].item(), 9), i))
            kept[:] = False
            kept[window] = True
            kept[past[order[len(held) - self.budget :]]] = True

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x [..., N, D] rotated on by so many positions, [N]."""
        angles = by.double()[:, None] * self.inv_freq
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
