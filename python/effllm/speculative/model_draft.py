"""A smaller model that drafts for a larger one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effllm._host import TokenTree
from effllm.generation.paged_model import PagedModel, context_of, effllm_attention, fitting_cache
from effllm.generation.sampling import Sampling
from effllm.generation.step_graph import use_graphs

from .draft import DraftRequest, Drafts, Propose

# Fed to a text at once after its prompt: a root, in front of it the last draft if all came true.
_GRAPH_TOKENS = 2


@dataclass(frozen=True)
class ModelDraft:
    """Drafts of a model with the target's tokens: a path, and at each depth its alternatives.

    Greedily the path is the model's own text, and trees keep the likeliest of its nodes. With a
    temperature the tokens are drawn from what the model makes of it, without replacement, and
    ``tree_verify`` is told their law; the path then follows the first one drawn.

    Args:
        model: a transformers causal language model, on the target's device.
        depth: tokens along the path: calls of the model for each tree.
        candidates: tokens at each depth, the path's included; 1 makes chains.
        cuda_graphs: of the draft's own steps, as in ``effllm.generate``.

    Source:
        Leviathan et al. (arXiv:2211.17192); alternatives as in SpecInfer (arXiv:2305.09781).
    """

    model: Any
    depth: int = 4
    candidates: int = 1
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        for name, value in (("depth", self.depth), ("candidates", self.candidates)):
            if value < 1:
                raise ValueError(f"ModelDraft: {name} must be at least 1, got {value}")

    @contextmanager
    def session(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> Iterator[Propose]:
        """As ``Draft`` says; the draft's own cache lives as long."""
        limit = context_of(self.model)
        longest = [len(prompt) + max_new_tokens for prompt in prompts]
        cache = fitting_cache(self.model, [min(n, limit or n) for n in longest])
        graphs = use_graphs(self.model, self.cuda_graphs, "ModelDraft")
        with effllm_attention(self.model):
            yield _Session(
                PagedModel(self.model, cache, graph_tokens=_GRAPH_TOKENS if graphs else 0),
                _vocab_size(model),
                limit,
                self.depth,
                self.candidates,
                sampling,
                [_Text(cache.add(), random.Random(f"draft {seed}")) for seed in seeds],
            ).propose


@dataclass
class _Text:
    """A request as the draft knows it."""

    seq: int
    rng: random.Random  # apart from what the target draws, as trees must not know that
    fed: list[int] = field(default_factory=list)  # tokens in the draft's cache
    certain: int = 0  # of these, the first that were no drafts


@dataclass
class _Growing:
    """A tree that grows by a level at a time."""

    request: DraftRequest
    text: _Text
    depth: int  # levels to grow
    tokens: list[int]
    parents: list[int]
    probs: list[float]
    path: int = 0  # its last node on the path
    inner: list[int] = field(default_factory=list)  # nodes that have children, by level


@dataclass
class _Session:
    paged: PagedModel
    target_vocab: int
    context: int | None
    depth: int
    candidates: int
    sampling: Sampling
    texts: list[_Text]

    def propose(self, requests: Sequence[DraftRequest], hidden: Tensor) -> Drafts:
        growing = [self._root(request) for request in requests]
        laws: list[tuple[list[_Growing], Tensor]] = []  # of each level
        for level in range(self.depth):
            live = [tree for tree in growing if tree.depth > level]
            if not live:
                break
            logits = self._feed(live)[:, : self.target_vocab]
            if self.sampling.temperature:
                law = self.sampling.law(logits)
                laws.append((live, law))
                drawn = self._draw(law, [tree.text.rng for tree in live])
                self._grow(live, drawn, law.gather(1, drawn.clamp(min=0)))
            else:
                best = logits.float().softmax(-1).topk(min(self.candidates, logits.shape[1]))
                self._grow(live, best.indices, best.values)
        if self.sampling.temperature:
            return self._drawn(growing, laws)
        return Drafts(
            [
                TokenTree.most_likely(tree.tokens, tree.parents, tree.probs, tree.request.max_nodes)
                for tree in growing
            ]
        )

    def _root(self, request: DraftRequest) -> _Growing:
        text, tokens = self.texts[request.index], request.text
        # Drafts that came true are in the cache. The root is always fed: its logits are needed.
        common = text.certain
        while common < min(len(text.fed), len(tokens) - 1) and text.fed[common] == tokens[common]:
            common += 1
        self.paged.cache.crop(text.seq, common)
        room = request.max_nodes - 1
        if (
            self.sampling.temperature
        ):  # then all nodes of a level are kept, as long as there is room
            room = -(-room // self.candidates)
        depth = min(self.depth, request.max_depth, room)
        if self.context is not None:
            depth = min(depth, self.context - len(tokens) + 1)
        vocab = _vocab_size(self.paged.model)
        if any(token >= vocab for token in tokens[common:]):
            depth = 0  # the target's vocabulary is larger, and its text uses that
        text.fed, text.certain = tokens[:common], common
        return _Growing(request, text, depth, tokens[-1:], [-1], [1.0])

    def _feed(self, live: list[_Growing]) -> Tensor:
        """Logits [B, V] after what the cache does not know yet of each path."""
        pending = []
        for tree in live:
            text = tree.text
            if tree.path:
                pending.append([tree.tokens[tree.path]])
            else:
                pending.append(tree.request.text[len(text.fed) :])
                text.certain = len(tree.request.text)
            text.fed += pending[-1]
        fed = [(tree.text.seq, tokens) for tree, tokens in zip(live, pending, strict=True)]
        return self.paged.step(fed).logits

    def _draw(self, law: Tensor, rngs: list[random.Random]) -> Tensor:
        """Distinct tokens of each row, int64 [B, candidates], -1 where the law has no more."""
        rest = law.double()
        drawn = []
        for _ in range(self.candidates):
            cumulative = rest.cumsum(-1)
            draws = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64)
            threshold = draws.to(law.device, non_blocking=True)[:, None] * cumulative[:, -1:]
            index = (cumulative <= threshold).sum(-1, keepdim=True)
            # The last that is possible, should the threshold have been rounded up to the sum.
            possible = (rest > 0).long()
            last = (possible.cumsum(-1) * possible).argmax(-1, keepdim=True)
            token = index.minimum(last)
            drawn.append(token.where(cumulative[:, -1:] > 0, -1))
            rest = rest.scatter(1, token, 0.0)
        return torch.cat(drawn, 1)

    def _grow(self, live: list[_Growing], tokens: Tensor, probs: Tensor) -> None:
        """Children of the path's last node; the first of them continues it."""
        for tree, children, weights in zip(live, tokens.tolist(), probs.tolist(), strict=True):
            parent, tree.path = tree.path, len(tree.tokens)
            tree.inner.append(parent)
            for token, weight in zip(children, weights, strict=True):
                if token >= 0:
                    tree.tokens.append(token)
                    tree.parents.append(parent)
                    tree.probs.append(weight)

    def _drawn(self, growing: list[_Growing], laws: list[tuple[list[_Growing], Tensor]]) -> Drafts:
        """The trees with the laws of their nodes. Cut where they are full, whatever was drawn: to
        choose among drawn nodes would change their law."""
        trees, first, total = [], {}, 0
        for tree in growing:
            count = tree.request.max_nodes
            trees.append(TokenTree(tree.tokens[:count], tree.parents[:count]))
            first[id(tree)] = total
            total += len(trees[-1])
        probs = torch.zeros(total, self.target_vocab, device=self.paged.model.device)
        for level, (live, law) in enumerate(laws):
            # A node of which no child was kept needs no law, and may itself be cut.
            rows = [
                (row, first[id(tree)] + tree.inner[level])
                for row, tree in enumerate(live)
                if tree.inner[level] < tree.request.max_nodes
            ]
            source, target = torch.tensor(rows, dtype=torch.int64).view(-1, 2).T.to(probs.device)
            probs[target, : law.shape[1]] = law[source]
        return Drafts(trees, probs)


def _vocab_size(model: Any) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size
