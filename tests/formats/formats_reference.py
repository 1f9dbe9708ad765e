"""The formats written a second time, in numpy, value by value on Python's integers.

Slow and plain on purpose: nothing here is shared with the package. A word is a Python integer, a
field of a word is ``word >> shift & mask``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight each nibble of a word holds


@dataclass
class Weight:
    """``W[n, k] = (q[n, k] - z[n, g_idx[k]]) * s[n, g_idx[k]]``; q, z plain ints, s a tensor."""

    q: np.ndarray  # int64 [N, K]
    z: np.ndarray  # int64 [N, G]
    s: Tensor  # float [N, G]
    g_idx: np.ndarray  # int64 [K]
    bits: int
    group_size: int

    @property
    def dense(self) -> Tensor:
        """The weight in float64, [N, K]."""
        values = torch.from_numpy(self.q - self.z[:, self.g_idx]).double()
        return values * self.s.double()[:, self.g_idx]


def random_weight(
    n: int,
    k: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Weight:
    """Random codes and zero points over their whole range, scales of about 0.02."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group_size)
    q = rng.integers(0, 1 << bits, (n, k))
    z = rng.integers(0, 1 << bits, (n, groups))
    if symmetric:
        z = np.full_like(z, 1 << (bits - 1))
    s = torch.from_numpy(rng.uniform(0.01, 0.03, (n, groups))).to(dtype)
    g_idx = np.arange(k) // group_size
    return Weight(q, z, s, rng.permutation(g_idx) if shuffled else g_idx, bits, group_size)


def stream(rows: np.ndarray, bits: int) -> Tensor:
    """[R, C] -> int32 [R, ceil(C * bits / 32)]: each row one little-endian number."""
    words = -(-rows.shape[1] * bits // 32)
    out = np.zeros((rows.shape[0], words), np.uint32)
    for r, row in enumerate(rows):
        number = sum(int(value) << (i * bits) for i, value in enumerate(row))
        for w in range(words):
            out[r, w] = number >> (32 * w) & 0xFFFFFFFF
    return torch.from_numpy(out.view(np.int32))


def read_stream(words: Tensor, bits: int, count: int) -> np.ndarray:
    """The inverse of ``stream``."""
    out = np.zeros((words.shape[0], count), np.int64)
    for r, row in enumerate(words.tolist()):
        number = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(row))
        for i in range(count):
            out[r, i] = number >> (i * bits) & ((1 << bits) - 1)
    return out


def awq_words(rows: np.ndarray) -> Tensor:
    """[R, C] -> int32 [R, C / 8] in AWQ's order."""
    out = np.zeros((rows.shape[0], rows.shape[1] // 8), np.uint32)
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] = sum(
                int(rows[r, 8 * c + column]) << (4 * i) for i, column in enumerate(AWQ_COLUMNS)
            )
    return torch.from_numpy(out.view(np.int32))


def awq_tensors(w: Weight) -> dict[str, Tensor]:
    return {
        "qweight": awq_words(w.q.T),
        "qzeros": awq_words(w.z.T),
        "scales": w.s.T.contiguous(),
    }


def gptq_tensors(w: Weight, version: int = 2) -> dict[str, Tensor]:
    """Version 1: the writer's word-wise subtraction; value by value for 3 bits."""
    zeros = stream(w.z.T, w.bits)
    if version == 1 and w.bits == 3:
        zeros = stream((w.z.T - 1) % 8, 3)
    elif version == 1:
        one = sum(1 << (w.bits * i) for i in range(32 // w.bits))
        words = (zeros.numpy().view(np.uint32).astype(np.int64) - one) % (1 << 32)
        zeros = torch.from_numpy(words.astype(np.uint32).view(np.int32))
    return {
        "qweight": stream(w.q, w.bits).T.contiguous(),
        "qzeros": zeros,
        "scales": w.s.T.contiguous(),
        "g_idx": torch.from_numpy(w.g_idx).int(),
    }


def packed_tensors(w: Weight, symmetric: bool = False) -> dict[str, Tensor]:
    """compressed-tensors pack-quantized."""
    tensors = {
        "weight_packed": stream(w.q, w.bits),
        "weight_scale": w.s,
        "weight_shape": torch.tensor(w.q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = stream(w.z.T, w.bits).T.contiguous()
    if (np.diff(w.g_idx) < 0).any():
        tensors["weight_g_idx"] = torch.from_numpy(w.g_idx).int()
    return tensors
