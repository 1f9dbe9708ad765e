"""Which keys and values a cache keeps when it may not keep all: policies of eviction.

A policy is a few numbers and two rules; ``EvictingKVCache`` does what they say. Each KV head of
each layer decides for itself, all keep equally many tokens, and a token keeps its position.
Dimensions: HKV heads, N tokens that a head holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class CachePolicy:
    """What all policies share; the classes below are those to use.

    Attributes:
        slots: tokens that each head keeps, None: all.
        protected: how many of the last tokens are never evicted.
        n_sink: how many of the first are never evicted.
        normalize: whether scores are divided by the number of queries that have seen the key.
        decoding: whether tokens are evicted while decoding, or after a prompt only.
        counts_decoding: whether decoding adds to the scores.
        counts_prompt: how many of a prompt's last queries add to the scores, None: all.
        sums: whether the scores add up over all steps, so that none can be taken back.
        prompt_window: how many of the last keys a token of a prompt sees, beside the first n_sink.
        rotates: whether kept tokens move up to those after them: see StreamingLLM.
    """

    slots: int | None = None
    protected: int = 1
    n_sink: int = 0
    normalize: bool = False
    decoding: bool = False
    counts_decoding: bool = False
    counts_prompt: int | None = 0
    sums: bool = False
    prompt_window: int | None = None
    rotates: bool = False

    def of_step(self, weights: Tensor) -> Tensor:
        """Scores from what the keys [HKV, N] got of a step's attention, in the order of slots."""
        return weights

    def kept(self, positions: Tensor, scores: Tensor) -> Tensor:
        """Which slots stay after a prompt, int64 [HKV, slots], in the order of their positions.

        positions, scores: [HKV, N > slots], of the token in each slot. As ``ops.h2o_append``
        chooses, again and again: of those that are not protected the lowest scores go, of equal
        ones the lowest positions; NaN counts as above all numbers.
        """
        seen = positions.max() + 1  # queries so far
        if self.normalize:
            scores = scores / (seen - positions).float()
        safe = (positions < self.n_sink) | (positions >= seen - self.protected)
        order = positions.argsort(-1)
        for key in (scores + 0.0, safe.byte()):
            order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
        assert self.slots is not None
        order = order[:, -self.slots :]
        return order.gather(-1, positions.gather(-1, order).argsort(-1))

    def needed(self, prompt: int, decode: int) -> int:
        """The most slots in use at a time, with a prompt of so many tokens and as many steps."""
        if self.slots is None:
            return prompt + decode
        if self.decoding:
            return max(prompt, min(self.slots, prompt + decode))
        return max(prompt, min(prompt, self.slots) + decode)


class Full(CachePolicy):
    """Keeps everything: the paged cache as it is."""

    def __init__(self) -> None:
        super().__init__()


class H2O(CachePolicy):
    """Heavy-Hitter Oracle (arXiv:2306.14048): keeps what has got the most attention, and the last.

    Scores are the sums of attention weights over all queries so far and over the query heads of a
    KV head.
    """

    def __init__(
        self, budget: int, recent: int, n_sink: int = 0, *, normalize: bool = False
    ) -> None:
        """``budget`` tokens per head, among them the last ``recent`` and the first ``n_sink``.
        ``normalize`` divides a token's score by the number of queries that have seen it; the paper
        does not, which favours early tokens.

        ValueError for a budget below 1, or that has no room for what must stay and the new token.
        """
        _check("H2O", budget=budget, recent=recent, n_sink=n_sink)
        super().__init__(
            budget,
            recent,
            n_sink,
            normalize,
            decoding=True,
            counts_decoding=True,
            counts_prompt=None,
            sums=True,
        )


class StreamingLLM(CachePolicy):
    """Attention sinks (arXiv:2309.17453): the first ``n_sink`` tokens and the last ``window`` stay.

    A prompt is read as decoding would: each token sees the sinks and the window.
    """

    def __init__(self, n_sink: int, window: int, *, rotate: bool = False) -> None:
        """``n_sink`` 0 is a plain window. ``rotate`` moves the sinks up to the window as it goes
        on, so that no distance exceeds n_sink + window, which need not be more than the model was
        trained on however long the text gets; it takes prompts up to n_sink + window. Without it,
        sinks stay where they were.

        ValueError for a window below 1 or a negative n_sink.
        """
        if n_sink < 0 or window < 1:
            raise ValueError(
                "StreamingLLM: n_sink must be at least 0 and window at least 1, got "
                f"{n_sink} and {window}"
            )
        super().__init__(
            n_sink + window,
            window,
            n_sink,
            decoding=True,
            prompt_window=window,
            rotates=rotate,
        )


class SnapKV(CachePolicy):
    """SnapKV (arXiv:2404.14469): of a prompt stays what its last tokens attend to.

    All tokens after it stay, too.

    Scores are the attention weights of the last ``window`` queries, summed over them and over the
    query heads of a KV head, then pooled along the text: the neighbours of what counts stay too.
    """

    kernel: int
    pooling: str

    def __init__(
        self, budget: int, window: int = 32, *, kernel: int = 7, pooling: str = "max"
    ) -> None:
        """``budget`` tokens per head stay of a prompt, among them the last ``window``; ``kernel``,
        an odd number of tokens, is pooled over by ``pooling`` "max" or "avg". A step of more than
        one token is a prompt.

        ValueError for a window below 1, a budget below the window, or another pooling or kernel.
        """
        _check("SnapKV", budget=budget, window=window)
        if kernel < 1 or kernel % 2 == 0 or pooling not in ("max", "avg"):
            raise ValueError(
                "SnapKV: kernel must be odd and at least 1 and pooling 'max' or 'avg', got "
                f"{kernel} and {pooling!r}"
            )
        super().__init__(budget, window, counts_prompt=window)
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "pooling", pooling)

    def of_step(self, weights: Tensor) -> Tensor:
        # The window itself stays anyway and must not lift its neighbours.
        before = weights[:, : -self.protected]
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(before, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.cat([pooled, weights[:, -self.protected :]], 1)


class TOVA(CachePolicy):
    """TOVA (arXiv:2401.06104): evicts what the last query attends to least, in all heads alike.

    Scores are the weights of the last query, averaged over all heads of a layer. The token that is
    new is not evicted at once, and sees ``budget`` tokens, itself included.
    """

    def __init__(self, budget: int) -> None:
        """``budget`` tokens per layer.

        ValueError for a budget below 1.
        """
        _check("TOVA", budget=budget)
        super().__init__(budget, decoding=True, counts_decoding=True, counts_prompt=1)

    def of_step(self, weights: Tensor) -> Tensor:
        return weights.mean(-2, keepdim=True).expand_as(weights)


def _check(owner: str, budget: int, **least: int) -> None:
    """ValueError for a negative number, or a budget without room for what must stay."""
    if min(least.get("recent", 1), least.get("window", 1)) < 1 or least.get("n_sink", 0) < 0:
        raise ValueError(f"{owner}: recent and window must be at least 1 and n_sink 0, got {least}")
    needed = max(1, sum(least.values()))
    if budget < needed:
        raise ValueError(f"{owner}: budget must be at least {needed}, got {budget}")
