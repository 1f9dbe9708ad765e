"""AutoAWQ's GEMM layout, 4 bits.

On disk: ``qweight`` int32 ``[K, N/8]``, ``qzeros`` int32 ``[K/g, N/8]`` (absent in some symmetric
files), ``scales`` fp16 ``[K/g, N]``. Words run along N, in an order of their own.

Source: package autoawq 0.2.9, ``WQLinear_GEMM`` and ``packing_utils``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.formats import bitstream
from effllm.formats.grouped import GroupedWeight

# Nibble i of a word holds column 8c + ORDER[i]; column 8c + j is in nibble REVERSE[j].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
REVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def decode(
    qweight: Tensor, qzeros: Tensor | None, scales: Tensor, group_size: int
) -> GroupedWeight:
    """``W[n, k] = (q[k, n] - z[k // g, n]) * scales[k // g, n]``, zero points stored as they are.

    Args:
        qweight: int32 ``[K, N/8]``.
        qzeros: int32 ``[K/g, N/8]``; None means 8.
        scales: float ``[K/g, N]``.
        group_size: g, or -1 for K.

    Raises:
        ValueError: a dtype or a shape that does not follow from N, K and g.
    """
    k, n = qweight.shape[0], scales.shape[-1]
    group_size = k if group_size == -1 else group_size
    zeros = None if qzeros is None else _unpack(qzeros, n).T.contiguous()
    return GroupedWeight(
        _unpack(qweight, n).T.contiguous(), scales.T.contiguous(), zeros, 4, group_size
    )


def encode(weight: GroupedWeight) -> dict[str, Tensor]:
    """``qweight``, ``qzeros`` and ``scales`` of a 4-bit weight with groups in order.

    Raises:
        ValueError: not 4 bits, groups out of order, N % 8 != 0, K % g != 0, or a zero point
            over 15.
    """
    n, k = weight.codes.shape
    if weight.bits != 4 or weight.g_idx is not None:
        raise ValueError("AWQ holds 4-bit codes with the input channels in order")
    if n % 8 or k % weight.group_size:
        raise ValueError(
            f"AWQ needs N % 8 == 0 and K % group_size == 0, got N = {n}, K = {k}, "
            f"group_size = {weight.group_size}"
        )
    scales = weight.scales.T.contiguous()
    zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8)
    if weight.zeros is not None:
        zeros = weight.zeros
    return {"qweight": _pack(weight.codes.T), "qzeros": _pack(zeros.T), "scales": scales}


def _unpack(words: Tensor, n: int) -> Tensor:
    nibbles = bitstream.unpack(words, 4, n)
    return nibbles.unflatten(-1, (n // 8, 8))[..., REVERSE].flatten(-2)


def _pack(codes: Tensor) -> Tensor:
    columns = codes.unflatten(-1, (codes.shape[-1] // 8, 8))
    return bitstream.pack(columns[..., ORDER].flatten(-2), 4)
