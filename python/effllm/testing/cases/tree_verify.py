"""Problems for tree_verify."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._host import TokenTree
from ...ops.tree_verify import tree_verify_ref
from ..case import SHORT_NAMES, Args, Case, Kwargs
from ..hostile import normal, poison_


@dataclass(frozen=True)
class TreeVerifyCase(Case):
    """Trees of any shape. Rows of logits that belong to no tree hold NaN."""

    num_trees: int
    num_nodes: int
    """Of the largest tree; with ``ragged`` the others have fewer, some none."""
    vocab: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    drawn: bool = False
    """Children are drawn from draft_probs, where they have room to differ."""
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = True
    accepted: int | None = None
    """So many draft tokens are all but certain to be accepted, and no more; else chance decides."""
    op: ClassVar[str] = "tree_verify"
    baseline_name: ClassVar[str] = "torch"

    @property
    def id(self) -> str:
        mode = "greedy" if self.temperature == 0 else f"t{self.temperature:g}"
        parts = [f"b{self.num_trees}", f"n{self.num_nodes}", f"v{self.vocab}", mode]
        parts += [f"k{self.top_k}"] * (self.top_k > 0) + [f"p{self.top_p:g}"] * (self.top_p < 1)
        parts += ["drawn"] * self.drawn + [SHORT_NAMES[self.dtype]]
        return "-".join(parts)

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        rng = random.Random(seed)
        sizes = [self.num_nodes] * self.num_trees
        if self.ragged:
            sizes[1:] = [rng.randint(0, self.num_nodes) for _ in sizes[1:]]
        cu_nodes = torch.tensor([0, *sizes]).cumsum(0)
        spare = 2 if self.ragged else 0
        num_rows = sum(sizes) + spare
        logits = normal(num_rows, self.vocab, seed=seed, outliers=0.0, device=device)
        draft_probs = None
        if self.drawn:
            noise = normal(num_rows, self.vocab, seed=seed + 1, outliers=0.0, device=device)
            draft_probs = (logits + 0.7 * noise).softmax(-1)
        trees = [
            self._tree(size, logits[start:], draft_probs, int(start), rng)
            for size, start in zip(sizes, cu_nodes.tolist(), strict=False)
        ]
        logits = logits.to(self.dtype)
        poison_(logits[num_rows - spare :])

        def nodes(name: str, dtype: torch.dtype) -> Tensor:
            values = [value for tree in trees if tree for value in getattr(tree, name)]
            return torch.tensor(values + [2**31 - 1] * spare, dtype=dtype)

        per_tree = (
            torch.full((self.num_trees,), self.temperature),
            torch.full((self.num_trees,), self.top_k, dtype=torch.int32),
            torch.full((self.num_trees,), self.top_p),
            torch.tensor([rng.randint(-(2**63), 2**63 - 1) for _ in sizes], dtype=torch.int64),
            torch.tensor([rng.randint(0, 2**40) for _ in sizes], dtype=torch.int64),
        )
        args = (
            logits,
            nodes("tokens", torch.int64),
            nodes("first_child", torch.int32),
            nodes("next_sibling", torch.int32),
            cu_nodes.to(torch.int32),
            *per_tree,
        )
        kwargs: Kwargs = {"max_nodes": self.num_nodes}
        if draft_probs is not None:
            kwargs["draft_probs"] = draft_probs
        return tuple(tensor.to(device) for tensor in args), kwargs

    def _tree(
        self, size: int, logits: Tensor, draft_probs: Tensor | None, start: int, rng: random.Random
    ) -> TokenTree | None:
        """A tree over rows of logits, some of which come to favour the children of their node."""
        if size == 0:
            return None
        spine = self.accepted or 0
        tokens, parents, children = [0], [-1], [0] * size
        drafts: dict[int, list[int]] = {}
        while len(tokens) < size:
            node = len(tokens)
            parent = node - 1 if node <= spine else rng.randrange(max(0, node - 8), node)
            if parent not in drafts:
                count = min(8, self.vocab)
                if draft_probs is not None:
                    generator = torch.Generator(draft_probs.device)
                    generator.manual_seed(rng.getrandbits(32))
                    drawn = torch.multinomial(
                        draft_probs[start + parent], count, generator=generator
                    )
                    drafts[parent] = drawn.tolist()
                else:
                    drafts[parent] = rng.sample(range(self.vocab), count)
            rank = children[parent]
            if rank == len(drafts[parent]):
                # A node with all of its drafts below it: the chain goes on.
                parent = next(i for i in range(node - 1, -1, -1) if children[i] == 0)
                continue_at = rng.sample(range(self.vocab), min(8, self.vocab))
                drafts.setdefault(parent, continue_at)
                rank = 0
            tokens.append(drafts[parent][rank])
            parents.append(parent)
            children[parent] += 1
            if self.accepted is not None:
                logits[parent, tokens[-1]] += 40.0 if node <= spine else -40.0
            elif draft_probs is None:
                logits[parent, tokens[-1]] += rng.choice([0.0, 3.0, 7.0])
        return TokenTree(tokens, parents)

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return tree_verify_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return tree_verify_ref(*args, **kwargs, dtype=torch.float32)

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """What verification that starts with all rows does before it has verified anything."""
        logits = args[0]
        if self.temperature == 0:
            return {"argmax of all rows": lambda: logits.argmax(-1)}
        return {
            "softmax of all rows": lambda: (logits / self.temperature).softmax(
                -1, dtype=torch.float32
            )
        }

    def bytes(self) -> int:
        rows = self.num_trees * (1 + (self.accepted or 0))
        return rows * self.vocab * (self.dtype.itemsize + 4 * self.drawn)

    def flops(self) -> int:
        return 4 * self.num_trees * (1 + (self.accepted or 0)) * self.vocab

    def shape(self) -> dict[str, int | str]:
        shape: dict[str, int | str] = {
            "B": self.num_trees,
            "W": self.num_nodes,
            "V": self.vocab,
            "mode": "greedy" if self.temperature == 0 else "sampled",
        }
        if self.top_k > 0:
            shape["top_k"] = self.top_k
        if self.top_p < 1:
            shape["top_p"] = f"{self.top_p:g}"
        return shape


def _cases() -> list[TreeVerifyCase]:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    case = TreeVerifyCase
    return [
        *(case(5, 16, 40, temperature, dtype=dtype)
          for temperature in (0.0, 0.8) for dtype in (bf16, half, fp32)),
        *(case(9, 12, 100, 0.7, top_k, top_p)
          for top_k, top_p in ((1, 1.0), (5, 1.0), (0, 0.6), (20, 0.8), (1000, 0.01))),
        *(case(9, 12, 60, 1.2, top_k, top_p, drawn=True)
          for top_k, top_p in ((0, 1.0), (12, 1.0), (0, 0.7), (30, 0.9))),
        # One node; the least vocabulary; the largest trees, wide ones among them.
        case(3, 1, 7, dtype=fp32, ragged=False),
        *(case(4, 6, 2, temperature, dtype=fp32) for temperature in (0.0, 1.0)),
        case(4, 64, 2000, 0.9, 50, 0.95),
        # More than one element per thread of a block, and sizes that no tile fits.
        *(case(2, 8, 5003, temperature, top_p=0.9, drawn=True) for temperature in (0.0, 1.0)),
        case(2, 4, 152064, 0.6, 40, 0.95, accepted=3),
        # Rows that a GPU spreads over CTAs: cuts of few tokens and of most, and none.
        *(case(3, 5, 20_001, temperature, top_k, top_p, drawn=drawn)
          for temperature, top_k, top_p in (
              (0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 500, 0.9), (0.1, 0, 0.9), (2.0, 0, 0.9)
          ) for drawn in (False, True)),
        case(1, 4, 33, ragged=False),
        case(0, 4, 33),
    ]  # fmt: skip


CASES = _cases()

# Batches of the 8B-shaped target with a vocabulary of 128256, three drafts of each tree accepted.
BENCH = [
    TreeVerifyCase(trees, nodes, 128256, *sampling, ragged=False, accepted=3)
    for trees, nodes in ((1, 64), (16, 16), (64, 16), (64, 64))
    for sampling in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 50, 0.95))
]
