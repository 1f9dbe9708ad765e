"""One prompt on its way through ``generate``: input checks, state, and its text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Prompts = Sequence[str] | Sequence[Sequence[int]] | Tensor


@dataclass
class Request:
    """A prompt, which sequence of the cache it is, and what it has produced."""

    index: int
    prompt: list[int]
    seed: int
    rng: random.Random
    seq: int = -1
    pending: list[int] = field(default_factory=list)  # tokens that the next step feeds
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    steps: int = 0  # that it took part in
    num_chars: int = 0  # of the text already streamed

    def accept(self, token: int, stops: frozenset[int], max_new_tokens: int) -> None:
        """Takes the token chosen after the last one."""
        self.tokens.append(token)
        self.pending = [token]
        if token in stops:
            self.finish_reason = "stop"
        elif len(self.tokens) == max_new_tokens:
            self.finish_reason = "length"

    def text(self, tokenizer: Any) -> str | None:
        """The new tokens decoded without special tokens, None without a tokenizer."""
        if tokenizer is None:
            return None
        return str(
            tokenizer.decode(
                self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def new_text(self, tokenizer: Any) -> str:
        """The text since the last call, up to the last complete character."""
        text = self.text(tokenizer) or ""
        if text.endswith("\ufffd") and self.finish_reason is None:
            return ""
        new = text[self.num_chars :]
        self.num_chars = len(text)
        return new


def make_requests(
    prompts: Prompts,
    tokenizer: Any,
    attention_mask: Tensor | None,
    *,
    seed: int,
    max_new_tokens: int,
    context: int | None,
) -> list[Request]:
    """One Request per prompt.

    ValueError for an empty prompt, or one that with ``max_new_tokens`` exceeds ``context``.
    """
    requests = []
    for index, tokens in enumerate(_token_lists(prompts, tokenizer, attention_mask)):
        if not tokens:
            raise ValueError(f"effllm.generate: prompt {index} is empty")
        if context is not None and len(tokens) + max_new_tokens > context:
            raise ValueError(
                f"effllm.generate: prompt {index} has {len(tokens)} tokens; with max_new_tokens="
                f"{max_new_tokens} it exceeds the model's context of {context}"
            )
        requests.append(Request(index, tokens, seed + index, random.Random(seed + index)))
    return requests


def _token_lists(prompts: Prompts, tokenizer: Any, mask: Tensor | None) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError("effllm.generate: prompts must be a list, got one string")
    if isinstance(prompts, Tensor):
        mask = torch.ones_like(prompts) if mask is None else mask
        if prompts.dim() != 2 or mask.shape != prompts.shape:
            raise ValueError(
                "effllm.generate: a prompt tensor and its attention_mask must be [B, S], got "
                f"{list(prompts.shape)} and {list(mask.shape)}"
            )
        return [row[keep].tolist() for row, keep in zip(prompts, mask.bool(), strict=True)]
    if mask is not None:
        raise ValueError("effllm.generate: attention_mask goes with a tensor of prompts only")
    if any(isinstance(prompt, str) for prompt in prompts):
        if tokenizer is None:
            raise ValueError("effllm.generate: prompts that are strings need a tokenizer")
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return [[int(token) for token in prompt] for prompt in prompts]
