"""Perplexity of a causal language model over a long text, in windows that overlap."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        nll: mean negative log-likelihood of a token, in nats.
        tokens: how many were predicted: all but the first.
        processed: tokens that went through the model, those seen again for context included.
        seconds: wall-clock time.
    """

    nll: float
    tokens: int
    processed: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return math.exp(self.nll)

    @property
    def tokens_per_s(self) -> float:
        """Processed tokens per second."""
        return self.processed / self.seconds


@torch.no_grad()
def score_text(
    model: Any,
    ids: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> TextScore:
    """Predicts each token of a text once, in windows of ``context`` tokens ``stride`` apart.

    A window scores the tokens that the one before did not hold, so each token but those at the
    start has at least ``context - stride`` tokens before it, and none counts twice.

    Args:
        model: ``model(ids, use_cache=False)`` gives ``logits`` ``[B, T, V]``. Put into evaluation
            mode, and left so.
        ids: int64 ``[T]``, at least 2.
        context: tokens of a window, at least 2.
        stride: 1 to context - 1, half the context if None. Small ones cost more and give every
            token more context.
        batch_size: windows at once.
        progress: show a progress bar.

    Raises:
        ValueError: sizes other than these.
    """
    stride = max(1, context // 2) if stride is None else stride
    if ids.dim() != 1 or ids.numel() < 2:
        raise ValueError(f"score_text: ids must be [T] with T >= 2, got {list(ids.shape)}")
    if context < 2 or not 1 <= stride < context:
        raise ValueError(
            "score_text: context must be at least 2 and stride in 1..context-1, "
            f"got {context} and {stride}"
        )
    model.eval()
    device = next(model.parameters()).device
    started = time.perf_counter()
    total, processed = 0.0, 0
    windows = [(0, min(context, ids.numel()), 1)]  # from, to, first token to score
    while windows[-1][1] < ids.numel():
        begin, end, _ = windows[-1]
        windows.append((begin + stride, min(begin + stride + context, ids.numel()), end))
    batches = _batches(windows, batch_size)
    for batch in tqdm(batches, desc="eval", leave=False, disable=not progress):
        x = torch.stack([ids[a:b] for a, b, _ in batch]).to(device)
        logits = model(x, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        processed += x.numel()
        for row, (a, b, first) in zip(loss.view(len(batch), -1), batch, strict=True):
            total += float(row[first - a - 1 : b - a - 1].double().sum())
    tokens = ids.numel() - 1
    return TextScore(total / tokens, tokens, processed, time.perf_counter() - started)


def _batches(windows: list[tuple[int, int, int]], size: int) -> list[list[tuple[int, int, int]]]:
    """Neighbours of equal length; only the last window may be shorter."""
    shorter = windows[-1][1] - windows[-1][0] < windows[0][1] - windows[0][0]
    full = windows[:-1] if shorter else windows
    return [full[i : i + size] for i in range(0, len(full), size)] + [
        windows[len(full) :]
    ] * shorter
