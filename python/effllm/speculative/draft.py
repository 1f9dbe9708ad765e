"""What a draft is to ``effllm.generate``, and the drafts that need no second model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from effllm._host import TokenTree

from .medusa import MedusaHeads

if TYPE_CHECKING:
    from effllm.generation.sampling import Sampling


@dataclass(frozen=True)
class DraftRequest:
    """An unfinished text that a tree is wanted for.

    Attributes:
        index: of its prompt.
        text: prompt and new tokens; the last of them is the root of the tree.
        max_nodes: of the tree, the root included, 1 or more.
        max_depth: of its nodes, 0 or more: tokens that may come after the root, less the one that
            the model itself chooses behind the path that it accepts.
    """

    index: int
    text: list[int]
    max_nodes: int
    max_depth: int


@dataclass(frozen=True)
class Drafts:
    """What a draft proposes for some requests.

    Attributes:
        trees: one for each request, in their order, within its limits.
        probs: fp32 [T, V], the ``draft_probs`` of ``tree_verify`` for all nodes of all trees, where
            children were drawn; None if all of them were certain to be proposed.
    """

    trees: list[TokenTree]
    probs: Tensor | None = None


Propose = Callable[[Sequence[DraftRequest], Tensor], Drafts]
"""Trees for B requests, given the hidden states [B, hidden_size] that the target's head chose their
roots from."""


class Draft(Protocol):
    """Proposes what comes next. Whatever it says costs time at most, and never changes the law of
    the text, as long as it does not know the numbers that ``tree_verify`` draws."""

    def session(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> AbstractContextManager[Propose]:
        """What one call of ``generate`` asks, step by step.

        Args:
            model: the target.
            prompts, seeds: of the requests, by index.
            max_new_tokens: for each of them.
            sampling: how the target chooses.
        """
        ...


@dataclass(frozen=True)
class NGramDraft:
    """What followed the last tokens where they came before in the same text; costs next to nothing.

    Args:
        max_ngram: tokens that must agree, at most; longer ones are tried first.
        max_draft: tokens taken from behind each earlier place. With as many nodes and a root the
            tree is a chain; with more nodes further places branch off.

    Source:
        Prompt lookup decoding; see ``TokenTree.prompt_lookup``.
    """

    max_ngram: int = 4
    max_draft: int = 8

    def __post_init__(self) -> None:
        for name, value in (("max_ngram", self.max_ngram), ("max_draft", self.max_draft)):
            if value < 1:
                raise ValueError(f"NGramDraft: {name} must be at least 1, got {value}")

    @contextmanager
    def session(
        self, model: Any, prompts: Sequence[Sequence[int]], **options: Any
    ) -> Iterator[Propose]:
        """As ``Draft`` says."""
        yield self._propose

    def _propose(self, requests: Sequence[DraftRequest], hidden: Tensor) -> Drafts:
        trees = []
        for request in requests:
            length, nodes = min(self.max_draft, request.max_depth), request.max_nodes
            if nodes <= self.max_draft + 1:  # chains stay chains where the text is about to end
                nodes = min(nodes, length + 1)
            if length:
                tree = TokenTree.prompt_lookup(request.text, self.max_ngram, length, nodes)
            else:
                tree = TokenTree.chain(request.text[-1:])
            trees.append(tree)
        return Drafts(trees)


@dataclass(frozen=True)
class MedusaDraft:
    """Trees of the likeliest tokens of heads on the target's last hidden state.

    Args:
        heads: trained for the target, on its device.
        candidates: tokens of each head that trees are made of; 1 makes chains.
    """

    heads: MedusaHeads
    candidates: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= self.heads.vocab_size:
            raise ValueError(
                "MedusaDraft: candidates must be in [1, vocab_size] = "
                f"[1, {self.heads.vocab_size}], got {self.candidates}"
            )

    @contextmanager
    def session(
        self, model: Any, prompts: Sequence[Sequence[int]], **options: Any
    ) -> Iterator[Propose]:
        """As ``Draft`` says; ValueError for heads of a model of other sizes."""
        head = model.get_output_embeddings()
        found = (self.heads.hidden_size, self.heads.vocab_size)
        if found != (head.in_features, head.out_features):
            raise ValueError(
                "MedusaDraft: heads must have the model's hidden_size and vocab_size, "
                f"{(head.in_features, head.out_features)}, got {found}"
            )

        def propose(requests: Sequence[DraftRequest], hidden: Tensor) -> Drafts:
            states = hidden.to(next(self.heads.parameters()).dtype)
            drafted = self.heads.candidates(
                states, lambda state: head(state.to(hidden.dtype)), self.candidates
            )
            return Drafts(
                [
                    TokenTree.best_first(
                        request.text[-1],
                        tokens[: request.max_depth],
                        probs[: request.max_depth],
                        request.max_nodes,
                    )
                    for request, tokens, probs in zip(requests, *drafted, strict=True)
                ]
            )

        yield propose
