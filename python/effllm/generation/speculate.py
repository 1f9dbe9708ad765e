"""Speculative decoding: a step verifies a tree of draft tokens for every unfinished prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from effllm import ops
from effllm._host import TokenTree
from effllm.cache.batch import AnyArray, upload
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
                hidden, rows = self._step(active, drafts, accept)
                left = [i for i, r in enumerate(active) if r.finish_reason is None]
                active = [active[i] for i in left]
                if active:
                    (last,) = self._upload(np.array([rows[i] for i in left], np.int64))
                    drafts = self._propose(propose, active, hidden[last])

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
        vocab = self._vocab_size
        for want, tree in zip(asked, drafts.trees, strict=True):
            tokens, depth = tree.tokens, max(tree.depths)
            nodes = len(tokens)
            if nodes > want.max_nodes or depth > want.max_depth or tokens[0] != want.text[-1]:
                raise ValueError(
                    f"effllm.generate: {name} must propose a tree on token {want.text[-1]} of at "
                    f"most {want.max_nodes} nodes and depth {want.max_depth}, got {nodes} nodes "
                    f"and depth {depth} on token {tokens[0]}"
                )
            if not 0 <= min(tokens) <= max(tokens) < vocab:
                raise ValueError(
                    f"effllm.generate: {name} must propose tokens in [0, {vocab}), got "
                    f"{min(tokens)} to {max(tokens)}"
                )
        return drafts

    def _step(
        self, active: list[Request], drafts: Drafts, accept: Callable[[Request, int], None]
    ) -> tuple[Tensor, list[int]]:
        """Feeds, verifies and accepts; returns the hidden states [T, hidden_size] of all nodes, and
        in which row is that which the last token of each request was chosen from."""
        cache, trees = self.paged.cache, drafts.trees
        # A root is the last of the tokens that are pending, all of which only a first step has.
        fed = [(r.seq, r.pending[:-1] + t.tokens) for r, t in zip(active, trees, strict=True)]
        roots = [cache.length(r.seq) + len(r.pending) - 1 for r in active]
        # On its way before the model runs: nothing waits between it and the verification.
        to_verify = self._send(trees, active, roots)
        step = self.paged.step(fed, trees)
        assert step.hidden is not None
        accept_index, num_accepted, next_token = ops.tree_verify(
            step.logits,
            **to_verify,
            draft_probs=drafts.probs,
            max_nodes=max(map(len, trees)),
        )
        if step.batch.tree_mask is not None:
            cache.move_path(step.batch, accept_index, num_accepted)

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
        return step.hidden, chosen_from

    def _send(
        self, trees: list[TokenTree], active: list[Request], roots: list[int]
    ) -> dict[str, Tensor]:
        """What ``tree_verify`` takes beside logits and draft_probs, on the device."""
        sampling, num_trees = self.sampling, len(trees)
        top_k = sampling.top_k or 0
        top_p = 1.0 if sampling.top_p is None else sampling.top_p

        def of_nodes(name: str, dtype: npt.DTypeLike) -> AnyArray:
            return np.array(list(chain.from_iterable(getattr(t, name) for t in trees)), dtype)

        arrays: dict[str, AnyArray] = {
            "tokens": of_nodes("tokens", np.int64),
            "first_child": of_nodes("first_child", np.int32),
            "next_sibling": of_nodes("next_sibling", np.int32),
            "cu_nodes": np.array([0, *accumulate(map(len, trees))], np.int32),
            "temperature": np.full(num_trees, sampling.temperature or 0.0, np.float32),
            # All tokens are no cut, and more are not allowed.
            "top_k": np.full(num_trees, top_k if top_k < self._vocab_size else 0, np.int32),
            "top_p": np.full(num_trees, top_p, np.float32),
            "seed": np.array([_int64(request.seed) for request in active], np.int64),
            "position": np.array(roots, np.int64),
        }
        return dict(zip(arrays, self._upload(*arrays.values()), strict=True))

    @property
    def _vocab_size(self) -> int:
        size: int = self.paged.model.config.get_text_config(decoder=True).vocab_size
        return size

    def _upload(self, *arrays: AnyArray) -> list[Tensor]:
        return upload(arrays, self.paged.cache.page_table.device)


def _int64(seed: int) -> int:
    """The seed's 64 lowest bits as a signed number."""
    return (seed + 2**63) % 2**64 - 2**63
