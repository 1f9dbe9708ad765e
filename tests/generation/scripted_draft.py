"""Drafts that say what a test wants, to see what ``effllm.generate`` makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from torch import Tensor

from effllm.speculative import DraftRequest, Drafts, TokenTree


@dataclass
class Scripted:
    """``make`` gives the tree of each request; what was asked is kept."""

    make: Callable[[DraftRequest], TokenTree]
    asked: list[list[DraftRequest]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    @contextmanager
    def session(
        self, model: Any, prompts: Sequence[Sequence[int]], **options: Any
    ) -> Iterator[Callable[[Sequence[DraftRequest], Tensor], Drafts]]:
        yield self._propose

    def _propose(self, requests: Sequence[DraftRequest], hidden: Tensor) -> Drafts:
        self.asked.append(list(requests))
        self.hidden.append(hidden)
        return Drafts([self.make(request) for request in requests])


def root_alone(request: DraftRequest) -> TokenTree:
    """Nothing is drafted."""
    return TokenTree.chain(request.text[-1:])


def chain_of(request: DraftRequest, tokens: Sequence[int]) -> TokenTree:
    """As many of the tokens, one after the other, as the limits allow."""
    length = min(request.max_depth, request.max_nodes - 1)
    return TokenTree.chain([request.text[-1], *tokens[:length]])


def still_to_come(request: DraftRequest, texts: Sequence[Sequence[int]]) -> list[int]:
    """What the whole texts, prompts included, have after the root."""
    return list(texts[request.index][len(request.text) :])


def random_tree(
    request: DraftRequest, texts: Sequence[Sequence[int]], random: Random, vocab: int
) -> TokenTree:
    """Of any size and shape within the limits; about half of the nodes are right, if their parents
    are."""
    coming = still_to_come(request, texts)
    tokens, parents, depths = [request.text[-1]], [-1], [0]
    for _ in range(random.randrange(request.max_nodes)):
        parent = random.choice([*range(len(tokens)), len(tokens) - 1])
        depth = depths[parent] + 1
        if depth > request.max_depth:
            continue
        token = random.randrange(vocab)
        if depth <= len(coming) and random.random() < 0.5:
            token = coming[depth - 1]
        siblings = [t for t, p in zip(tokens, parents, strict=True) if p == parent]
        if token not in siblings:
            tokens.append(token)
            parents.append(parent)
            depths.append(depth)
    return TokenTree(tokens, parents)
