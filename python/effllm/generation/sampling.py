"""Choosing the next token of every row from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ValueError for a value out of range.

    Attributes:
        temperature: None or 0 takes the likeliest token; otherwise it divides the logits.
        top_k: keep the k likeliest tokens.
        top_p: then keep the fewest likeliest tokens whose probabilities reach this sum.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"effllm.generate: temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"effllm.generate: top_k must be >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"effllm.generate: top_p must be in (0, 1], got {self.top_p}")

    def choose(self, logits: Tensor, draws: Sequence[float] | Tensor) -> Tensor:
        """One token per row, int64 [B], from logits [B, V] and a draw in [0, 1) per row; those may
        be on the device already, in fp64.

        Inverts the cumulative distribution. A row's token depends on its own logits and draw only,
        never on the rest of the batch.
        """
        if not self.temperature:
            return logits.argmax(-1)
        probs, tokens = self._sorted_law(logits)
        cumulative = probs.cumsum(-1)
        draw = torch.as_tensor(draws, dtype=torch.float64, device=logits.device)[:, None]
        # Strictly above the threshold, so that a token of probability 0 is never chosen; the bound
        # matters when draw * total rounds up to the total.
        index = (cumulative <= draw * cumulative[:, -1:]).sum(-1, keepdim=True)
        last = (probs > 0).sum(-1, keepdim=True) - 1
        return tokens.gather(-1, index.minimum(last)).squeeze(-1)

    def law(self, logits: Tensor) -> Tensor:
        """What ``choose`` draws from, up to a factor: fp32 [B, V], from logits [B, V].

        Not for greedy sampling, which draws nothing.
        """
        probs, tokens = self._sorted_law(logits)
        law = torch.zeros_like(logits, dtype=torch.float32)
        return law.scatter_(-1, tokens[:, : probs.shape[1]], probs.float())

    def _sorted_law(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and their tokens, the likeliest first; fewer weights than tokens after top_k."""
        assert self.temperature
        # fp64, so that the sums over a large vocabulary are exact enough to compare with a draw.
        scores, tokens = (logits.double() / self.temperature).sort(
            dim=-1, descending=True, stable=True
        )
        probs = scores[:, : self.top_k].softmax(-1)
        if self.top_p is not None:
            before = probs.cumsum(-1) - probs
            probs = probs.masked_fill(before >= self.top_p, 0.0)
        return probs, tokens
