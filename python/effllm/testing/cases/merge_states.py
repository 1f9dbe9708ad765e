"""Problems for merge_states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.merge_states import merge_states_ref
from ..case import Args, Case, Kwargs
from ..hostile import normal, poison_


@dataclass(frozen=True)
class MergeStatesCase(Case):
    """States whose lse differ by up to some 20; where a state has no keys its out is NaN."""

    num_states: int
    num_tokens: int
    num_heads: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    empty: float = 0.3
    """Which part of all rows has no keys; among many rows some have none in any state."""
    op: ClassVar[str] = "merge_states"
    baseline_name: ClassVar[str] = "torch"

    @property
    def id(self) -> str:
        return (
            f"s{self.num_states}-t{self.num_tokens}-h{self.num_heads}-d{self.head_dim}-"
            f"{str(self.dtype).removeprefix('torch.')}-empty{self.empty:g}"
        )

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        shape = (self.num_tokens, self.num_heads, self.head_dim)
        generator = torch.Generator().manual_seed(seed)
        outs, lses = [], []
        for state in range(self.num_states):
            out = normal(*shape, dtype=self.dtype, seed=seed * self.num_states + state)
            lse = 8 + 4 * torch.randn(shape[:2], generator=generator)
            empty = torch.rand(shape[:2], generator=generator) < self.empty
            outs.append(poison_(out, empty[..., None]).to(device))
            lses.append(lse.masked_fill(empty, -math.inf).to(device))
        return (outs, lses), {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return merge_states_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = merge_states_ref(*args, **kwargs, dtype=torch.float32)
        return out.to(self.dtype), lse

    def bytes(self) -> int:
        rows = self.num_tokens * self.num_heads
        return (self.num_states + 1) * rows * (self.head_dim * self.dtype.itemsize + 4)

    def flops(self) -> int:
        return 2 * self.num_states * self.num_tokens * self.num_heads * self.head_dim

    def shape(self) -> dict[str, int | str]:
        return {
            "states": self.num_states,
            "T": self.num_tokens,
            "HQ": self.num_heads,
            "D": self.head_dim,
        }


def _cases() -> list[MergeStatesCase]:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    case = MergeStatesCase
    return [
        *(case(2, 9, dtype=dtype) for dtype in (bf16, half, fp32)),
        *(case(num_states, 5, 3, 128, half) for num_states in (1, 3, 8, 32)),
        # Rows that 16-byte accesses do not fit, and head dims that are no power of two.
        *(case(3, 7, 5, dim, dtype) for dim in (1, 7, 12, 72, 256) for dtype in (bf16, fp32)),
        # More chunks per token than threads in a block.
        case(2, 3, 71, 128),
        # All rows have keys in all states; none has keys in any.
        case(2, 9, empty=0.0),
        case(3, 9, empty=1.0),
        *(case(2, *shape) for shape in ((0, 4), (4, 0))),
        # More tokens than the other two dimensions of a grid may have.
        case(2, 65537, 1, 8),
    ]


CASES = _cases()

# A decode step and a prompt of Llama-3-8B after a shared prefix; many parts of a long context.
BENCH = [
    *(MergeStatesCase(2, tokens, 32, 128, empty=0.0) for tokens in (1, 32, 256, 8192)),
    MergeStatesCase(8, 64, 32, 128, empty=0.0),
]
