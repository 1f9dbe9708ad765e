"""GPTQ as AutoGPTQ (version 1) and GPTQModel (version 2) store it, 2, 3, 4 and 8 bits.

On disk: ``qweight`` int32 ``[ceil(K * bits / 32), N]``, words along K; ``qzeros`` int32
``[G, ceil(N * bits / 32)]``, words along N; ``scales`` ``[G, N]``; ``g_idx`` int32 ``[K]``, the
group of each input channel (act-order leaves it unsorted). Version 1 stores each zero point minus
one, version 2 as it is.

Source: packages auto-gptq 0.7.1 and gptqmodel 7.7.0 (``nn_modules/qlinear``, ``utils/model.py``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from effllm.formats import bitstream
from effllm.formats.grouped import GroupedWeight, checked_groups

Version = Literal[1, 2]


def stored_version(stored: Tensor, bits: int, symmetric: bool, declared: Version) -> Version:
    """Which version the zero points are in; of symmetric files the zero points tell.

    Releases of GPTQModel wrote version 2 under the name of version 1, which shifts every weight by
    a scale. A symmetric file has one zero point, so what is stored says what is meant.

    Args:
        stored: uint8, the zero points as stored.
        bits: of a code.
        symmetric: what the config says.
        declared: what the config says.
    """
    middle = 1 << (bits - 1)
    if symmetric and bool((stored == middle).all()):
        return 2
    if symmetric and bool((stored == middle - 1).all()):
        return 1
    return declared


def is_ambiguous(stored: Tensor, bits: int, version: Version) -> bool:
    """Whether readers of version 1 disagree about these zero points.

    A zero point of 0 was stored as -1: some writers borrowed from the neighbours in the word, some
    lost them, some readers add one to each value and get ``2 ** bits``.
    """
    return version == 1 and bool((stored == (1 << bits) - 1).any())


def stored_zeros(qzeros: Tensor, bits: int, n: int) -> Tensor:
    """uint8 ``[G, N]``: the zero points of ``qzeros`` as stored."""
    return bitstream.unpack(qzeros, bits, n)


def decode(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    version: Version,
) -> GroupedWeight:
    """``W[n, k] = (q[k, n] - z[group(k), n]) * scales[group(k), n]``.

    Args:
        qweight: int32 ``[ceil(K * bits / 32), N]``.
        qzeros: int32 ``[G, ceil(N * bits / 32)]``. Version 1 is undone on whole words, the inverse
            of how GPTQModel writes it, borrows included; 3-bit fields are undone one by one, as
            GPTQModel does.
        scales: float ``[G, N]``.
        g_idx: int ``[K]``; negative entries count from the end. None means ``k // g``.
        bits: 2, 3, 4 or 8.
        group_size: g, or -1 for K.
        in_features: K.
        version: see ``stored_version``.

    Raises:
        ValueError: a dtype or shape that does not follow, or a ``g_idx`` outside of the groups.
    """
    num_groups, n = scales.shape
    group_size = in_features if group_size == -1 else group_size
    if version == 1 and bits != 3:
        # The sum wraps as the writer's difference did.
        qzeros = qzeros + sum(1 << (bits * i) for i in range(32 // bits))
    zeros = stored_zeros(qzeros, bits, n)
    if version == 1 and bits == 3:
        zeros = (zeros + 1) & 7
    if g_idx is not None:
        g_idx = checked_groups(g_idx, num_groups, in_features, group_size)
    codes = bitstream.unpack(qweight.T, bits, in_features)
    return GroupedWeight(
        codes, scales.T.contiguous(), zeros.T.contiguous(), bits, group_size, g_idx
    )


def encode(weight: GroupedWeight) -> dict[str, Tensor]:
    """``qweight``, ``qzeros`` (version 2), ``scales`` and ``g_idx``.

    Raises:
        ValueError: a zero point does not fit in the bits.
    """
    zeros = torch.full_like(weight.scales, 1 << (weight.bits - 1), dtype=torch.uint8)
    if weight.zeros is not None:
        zeros = weight.zeros
    return {
        "qweight": bitstream.pack(weight.codes, weight.bits).T.contiguous(),
        "qzeros": bitstream.pack(zeros.T, weight.bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": weight.groups.int(),
    }
