"""Problems for rope_kv_append."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops._kv_codes import QUANTIZED_KV
from ...ops.kv_append import kv_append
from ...ops.rope_kv_append import rope_kv_append_ref, rotate_ref
from ..case import Args, Kwargs
from ..hostile import normal
from .kv_append import KvAppendCase


def rotary_tables(
    max_position: int, rotary_dim: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin [MAXPOS, R / 2] for frequencies 10000 ** (-2i / R), the same on every device."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


@dataclass(frozen=True)
class RopeKvAppendCase(KvAppendCase):
    """Tokens of a KvAppendCase at random positions, the last one of the tables among them."""

    num_heads: int = 4
    rotary_dim: int | None = None
    """R; None is all of the head."""
    interleaved: bool = False
    max_position: int = 50
    op: ClassVar[str] = "rope_kv_append"
    baseline_name: ClassVar[str] = "torch RoPE, kv_append"

    @property
    def id(self) -> str:
        rotary = "" if self.rotary_dim is None else f"-r{self.rotary_dim}"
        pairs = "-interleaved" if self.interleaved else ""
        return f"hq{self.num_heads}-{super().id}{rotary}{pairs}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        (k, v, *caches), _ = super().make(device, seed)
        heads = self.num_heads + (self.num_kv_heads if self.packed else 0)
        q = normal(
            self.num_tokens,
            heads,
            self.head_dim,
            dtype=self.dtype,
            device=device,
            seed=seed + 1,
        )[:, : self.num_heads]
        generator = torch.Generator().manual_seed(seed)
        positions = torch.randint(self.max_position, (self.num_tokens,), generator=generator)
        positions[-1:] = self.max_position - 1
        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        tables = rotary_tables(self.max_position, rotary_dim, device)
        args = (q, k, v, *tables, positions.to(device), *caches)
        return args, {"interleaved": self.interleaved}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return rope_kv_append_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return rope_kv_append_ref(*args, **kwargs)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """PyTorch's rotation of q and k, then kv_append: what the op makes one launch of."""
        q, k, v, cos, sin, positions, *caches = args

        def rotate_and_append() -> Tensor:
            rotated, key = (rotate_ref(x, cos, sin, positions, **kwargs) for x in (q, k))
            kv_append(key, v, *caches)
            return rotated

        return rotate_and_append

    def bytes(self) -> int:
        row = self.head_dim * self.dtype.itemsize
        tables = 2 * 4 * self._half() * min(self.num_tokens, self.max_position)
        return super().bytes() + self.num_tokens * (2 * self.num_heads * row + 8) + tables

    def flops(self) -> int:
        return self.num_tokens * (self.num_heads + self.num_kv_heads) * 6 * self._half()

    def shape(self) -> dict[str, int | str]:
        shape = super().shape()
        return {"T": shape.pop("T"), "HQ": self.num_heads} | shape

    def _half(self) -> int:
        return (self.head_dim if self.rotary_dim is None else self.rotary_dim) // 2


def _cases() -> list[RopeKvAppendCase]:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    case = RopeKvAppendCase
    both = (False, True)
    return [
        *(case(9, dtype=dtype, interleaved=i) for dtype in (bf16, half, fp32) for i in both),
        # Part of a head: in vectors, with halves that no vector starts at, one pair, none.
        *(
            case(11, 3, dim, 4, half, rotary_dim=rotary_dim, num_heads=5, interleaved=i)
            for dim, rotary_dim in ((96, 32), (80, 24), (80, 20), (64, 2), (64, 0))
            for i in both
        ),
        *(case(7, 2, dim, 3, num_heads=2) for dim in (40, 72, 256)),
        # Rows that 16-byte accesses do not fit, some with an odd element that stays.
        *(
            case(5, 3, dim, 4, dtype, rotary_dim=dim // 2 * 2, num_heads=6, interleaved=i)
            for dim in (1, 7, 12)
            for dtype in (bf16, fp32)
            for i in both
        ),
        case(17, 8, 128, 64, skip_every=None, packed=False, num_heads=32),
        case(6, skip_every=1),
        # Nothing to do, in each dimension.
        *(case(*shape) for shape in ((0, 2, 64), (4, 0, 64), (4, 2, 0))),
        case(4, num_heads=0),
        # Quantised caches: each dtype of k, vectors and single elements, warps of rows of q and k.
        *(
            case(
                23,
                3,
                dim,
                4,
                dtype,
                rotary_dim=rotary_dim,
                num_heads=9,
                kv_dtype=kv_dtype,
                interleaved=i,
            )
            for kv_dtype in QUANTIZED_KV
            for dim, rotary_dim, dtype in (
                (128, None, bf16),
                (64, 32, half),
                (256, None, fp32),
                (80, 20, bf16),
                (6, None, half),
            )
            for i in both
        ),
        case(9, 2, 7, 4, half, rotary_dim=6, kv_dtype="e4m3"),
        case(3, kv_dtype="int4", skip_every=1),
        # More tokens than the other two dimensions of a grid may have.
        case(65537, 1, 8, num_heads=1),
    ]


CASES = _cases()

# A decode step and prompts of Llama-3-8B.
BENCH = [
    RopeKvAppendCase(
        tokens, 8, 128, 64, skip_every=None, kv_dtype=kv_dtype, num_heads=32, max_position=8192
    )
    for kv_dtype in (None, *QUANTIZED_KV)
    for tokens in (1, 32, 256, 8192, 65536)
]
