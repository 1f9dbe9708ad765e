"""Speculative decoding: a step verifies a tree of draft tokens for every unfinished prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from effllm import ops
from effllm._host import TokenTree
from effllm.generation.paged_model import PagedModel
from effllm.generation.request import Request
from effllm.generation.sampling import Sampling
from effllm.speculative.draft import Draft, DraftRequest, Drafts, Propose


@dataclass(frozen=True)
class Speculation:
    """One call of ``generate`` with a draft.

    The first step feeds the prompts, whose last tokens are trees of one node. Each later step feeds
    the trees that the draft proposes: node i of a tree lies i places behind its root in the cache
    until the accepted path is moved together, while its position in the text is its depth.
    """

    paged: PagedModel
    draft: Draft
    sampling: Sampling
    max_nodes: int
    max_new_tokens: int

    def run(self, requests: list[Request], accept: Callable[[Request, int], None]) -> None:
        """Calls ``accept`` for every token until all requests have a ``finish_reason``."""
        with self.draft.session(
            self.paged.model,
            [request.prompt for request in requests],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            seeds=[request.seed for request in requests],
        ) as propose:
            active = requests
            drafts = Drafts([TokenTree.chain(request.prompt[-1:]) for request in active])
            while active:
                hidden = self._step(active, drafts, accept)
                left = [i for i, r in enumerate(active) if r.finish_reason is None]
                active = [active[i] for i in left]
                if active:
                    drafts = self._propose(propose, active, hidden[left])

    def _propose(self, propose: Propose, active: list[Request], hidden: Tensor) -> Drafts:
        """What the draft says, checked: a tree beyond its limits would write where it must not."""
        cache = self.paged.cache
        asked = []
        for request in active:
            held = len(cache.pages(request.seq)) * cache.page_size
            room = min(held, cache.max_seq_len) - cache.length(request.seq)
            asked.append(
                DraftRequest(
                    request.index,
                    request.prompt + request.tokens,
                    max(1, min(self.max_nodes, room)),
                    self.max_new_tokens - len(request.tokens) - 1,
                )
            )
        drafts = propose(asked, hidden)
        name = type(self.draft).__name__
        vocab = self.paged.model.config.get_text_config(decoder=True).vocab_size
        for want, tree in zip(asked, drafts.trees, strict=True):
            nodes, depth = len(tree), max(tree.depths)
            if nodes > want.max_nodes or depth > want.max_depth or tree.tokens[0] != want.text[-1]:
                raise ValueError(
                    f"effllm.generate: {name} must propose a tree on token {want.text[-1]} of at "
                    f"most {want.max_nodes} nodes and depth {want.max_depth}, got {nodes} nodes "
                    f"and depth {depth} on token {tree.tokens[0]}"
                )
            if not 0 <= min(tree.tokens) <= max(tree.tokens) < vocab:
                raise ValueError(
                    f"effllm.generate: {name} must propose tokens in [0, {vocab}), got "
                    f"{min(tree.tokens)} to {max(tree.tokens)}"
                )
        return drafts

    def _step(
        self, active: list[Request], drafts: Drafts, accept: Callable[[Request, int], None]
    ) -> Tensor:
        """Feeds, verifies and accepts; returns the hidden states [B, hidden_size] that the last
        tokens were chosen from."""
        cache, trees = self.paged.cache, drafts.trees
        # A root is the last of the tokens that are pending, all of which only a first step has.
        fed = [r.pending[:-1] + tree.tokens for r, tree in zip(active, trees, strict=True)]
        roots = [cache.length(r.seq) + len(r.pending) - 1 for r in active]
        batch = cache.step([(r.seq, len(tokens)) for r, tokens in zip(active, fed, strict=True)])
        branching = not all(_is_chain(tree) for tree in trees)  # a chain is text as any other
        if branching:
            batch = batch.with_trees(trees)
        ends = accumulate(len(tokens) for tokens in fed)
        nodes = [range(end - len(tree), end) for end, tree in zip(ends, trees, strict=True)]
        logits, hidden = self.paged.logits_and_hidden(
            batch, list(chain(*fed)), self._tensor(list(chain(*nodes)), torch.int64)
        )
        accept_index, num_accepted, next_token = self._verify(logits, drafts, active, roots)
        if branching:
            cache.move_path(batch, accept_index, num_accepted)

        # Everything that the host needs, in one transfer.
        answers = torch.cat([accept_index, num_accepted[:, None], next_token[:, None]], 1).tolist()
        chosen_from, first = [], 0
        for request, tree, root, answer in zip(active, trees, roots, answers, strict=True):
            *path, count, token = answer
            chosen_from.append(first + path[count - 1])
            first += len(tree)
            request.steps += 1
            tokens = tree.tokens
            for new in [*(tokens[node] for node in path[1:count]), token]:
                if request.finish_reason is None:
                    accept(request, new)
            # Behind the path stands what was rejected, behind a stop token what is not wanted.
            length = min(root + count, len(request.prompt) + len(request.tokens))
            cache.crop(request.seq, length, keep_pages=True)
        return hidden[self._tensor(chosen_from, torch.int64)]

    def _verify(
        self, logits: Tensor, drafts: Drafts, active: list[Request], roots: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        trees, sampling = drafts.trees, self.sampling

        def of_nodes(name: str, dtype: torch.dtype) -> Tensor:
            return self._tensor([x for tree in trees for x in getattr(tree, name)], dtype)

        def of_trees(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((len(trees),), value, dtype=dtype, device=logits.device)

        return ops.tree_verify(
            logits,
            of_nodes("tokens", torch.int64),
            of_nodes("first_child", torch.int32),
            of_nodes("next_sibling", torch.int32),
            self._tensor([0, *accumulate(len(tree) for tree in trees)], torch.int32),
            of_trees(sampling.temperature or 0.0, torch.float32),
            of_trees(min(sampling.top_k or 0, logits.shape[1]), torch.int32),
            of_trees(1.0 if sampling.top_p is None else sampling.top_p, torch.float32),
            self._tensor([_int64(request.seed) for request in active], torch.int64),
            self._tensor(roots, torch.int64),
            drafts.probs,
            max_nodes=max(len(tree) for tree in trees),
        )

    def _tensor(self, values: list[int], dtype: torch.dtype) -> Tensor:
        """On the device of the cache; nothing is waited for."""
        host = torch.tensor(values, dtype=dtype)
        return host.to(self.paged.cache.page_table.device, non_blocking=True)


def _is_chain(tree: TokenTree) -> bool:
    return tree.parents == list(range(-1, len(tree) - 1))


def _int64(seed: int) -> int:
    """The seed's 64 lowest bits as a signed number."""
    return (seed + 2**63) % 2**64 - 2**63
