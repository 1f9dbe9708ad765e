"""Problems for kv_append."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops._kv_codes import QUANTIZED_KV, as_bits, codes_per_row, empty_kv_scale, quantize_kv
from ...ops.kv_append import kv_append_ref
from ..case import SHORT_NAMES, Args, Case, Kwargs
from ..hostile import normal, poison_


@dataclass(frozen=True)
class KvAppendCase(Case):
    """Tokens into random slots of a cache full of NaN; one in ``skip_every`` goes nowhere."""

    num_tokens: int
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    skip_every: int | None = 5
    packed: bool = True
    """k and v are slices of one [T, (HQ + 2 * HKV) * D] tensor with HQ = HKV, as projections leave
    them; else dense."""
    kv_dtype: str | None = None
    """Of a quantised cache: a key of QUANTIZED_KV; None: the cache is in ``dtype``."""
    op: ClassVar[str] = "kv_append"
    baseline_name: ClassVar[str] = "torch.index_put"

    @property
    def id(self) -> str:
        skips = "" if self.skip_every is None else f"-skip{self.skip_every}"
        return (
            f"t{self.num_tokens}-h{self.num_kv_heads}-d{self.head_dim}-p{self.page_size}-"
            f"{str(self.dtype).removeprefix('torch.')}{skips}{'' if self.packed else '-dense'}"
            f"{f'-{self.kv_dtype}' if self.kv_dtype else ''}"
        )

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        heads = self.num_kv_heads
        qkv = normal(
            self.num_tokens, 3, heads, self.head_dim, dtype=self.dtype, device=device, seed=seed
        )
        k, v = qkv[:, 1], qkv[:, 2]
        if not self.packed:
            k, v = k.contiguous(), v.contiguous()
        num_pages = -(-self.num_tokens // self.page_size) + 2
        cache_dtype = QUANTIZED_KV[self.kv_dtype] if self.kv_dtype else self.dtype
        row = codes_per_row(self.head_dim, cache_dtype)
        cache_shape = (num_pages, heads, self.page_size, row)
        k_cache, v_cache = (
            poison_(torch.empty(cache_shape, dtype=cache_dtype, device=device)).transpose(1, 2)
            for _ in range(2)
        )
        scales = [
            poison_(empty_kv_scale(num_pages, heads, self.page_size, cache_dtype, device))
            for _ in range(2 if self.kv_dtype else 0)
        ]
        generator = torch.Generator().manual_seed(seed)
        slots = torch.randperm(num_pages * self.page_size, generator=generator)[: self.num_tokens]
        if self.skip_every is not None:
            slots[:: self.skip_every] = -1
        return (k, v, k_cache, v_cache, slots.to(device), *scales), {}

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return kv_append_ref(*args, **kwargs)

    def baseline(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return kv_append_ref(*args, **kwargs)

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Quantisation, where there is one, and indexed assignment with the indices at hand."""
        k, v, k_cache, v_cache, slots, *scales = args
        written = slots >= 0
        k, v, slots = k[written], v[written], slots[written]
        pages = torch.div(slots, self.page_size, rounding_mode="floor")
        offsets = slots % self.page_size

        def assign() -> None:
            k_cache[pages, offsets] = k
            v_cache[pages, offsets] = v

        def quantize_and_assign() -> None:
            for rows, cache, scale in ((k, k_cache, scales[0]), (v, v_cache, scales[1])):
                codes, scale[pages, offsets] = quantize_kv(rows, cache.dtype)
                as_bits(cache)[pages, offsets] = as_bits(codes)

        return quantize_and_assign if scales else assign

    def bytes(self) -> int:
        read = written = self.head_dim * self.dtype.itemsize
        if self.kv_dtype:
            written = codes_per_row(self.head_dim, QUANTIZED_KV[self.kv_dtype]) + 4
        skipped = 0 if self.skip_every is None else -(-self.num_tokens // self.skip_every)
        rows = 2 * (self.num_tokens - skipped) * self.num_kv_heads
        return rows * (read + written) + 8 * self.num_tokens

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {
            "T": self.num_tokens,
            "HKV": self.num_kv_heads,
            "D": self.head_dim,
            "page": self.page_size,
            "kv_dtype": self.kv_dtype or SHORT_NAMES[self.dtype],
        }


def _cases() -> list[KvAppendCase]:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    return [
        *(KvAppendCase(9, dtype=dtype) for dtype in (bf16, half, fp32)),
        *(KvAppendCase(40, 3, 128, page_size, half) for page_size in (1, 3, 64, 256)),
        *(KvAppendCase(7, 2, dim) for dim in (40, 72, 256)),
        # Rows that 16-byte accesses do not fit: copied element by element.
        *(KvAppendCase(11, 3, dim, 4, dtype) for dim in (1, 7, 12) for dtype in (bf16, fp32)),
        KvAppendCase(17, 8, 128, skip_every=None, packed=False),
        KvAppendCase(6, skip_every=1),
        # Nothing to do, in each dimension.
        *(KvAppendCase(*shape) for shape in ((0, 2, 64), (4, 0, 64), (4, 2, 0))),
        # Quantised caches: each dtype of k, head dims that are no multiple of a vector, no tokens.
        *(
            KvAppendCase(23, 3, dim, 4, dtype, kv_dtype=kv_dtype)
            for kv_dtype in QUANTIZED_KV
            for dim, dtype in ((128, bf16), (64, half), (256, fp32), (80, bf16), (6, half))
        ),
        KvAppendCase(9, 2, 7, 4, half, kv_dtype="e4m3"),
        KvAppendCase(17, 8, 128, 1, skip_every=None, packed=False, kv_dtype="int8"),
        KvAppendCase(0, 2, 64, kv_dtype="int4"),
        # More tokens than the other two dimensions of a grid may have.
        KvAppendCase(65537, 1, 8),
    ]


CASES = _cases()

# A decode step and a prompt of Llama-3-8B; the last one is large enough to be bound by bytes.
BENCH = [
    KvAppendCase(tokens, 8, 128, 64, skip_every=None, kv_dtype=kv_dtype)
    for kv_dtype in (None, *QUANTIZED_KV)
    for tokens in (1, 32, 256, 8192, 65536)
]
