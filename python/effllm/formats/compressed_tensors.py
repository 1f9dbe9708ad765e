"""compressed-tensors ``pack-quantized``: integer weights of 2 to 8 bits, words along K.

On disk: ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``; ``weight_scale`` ``[N, K/g]``,
``[N, 1]`` or one value; ``weight_shape`` int64 ``[2]`` = (N, K); for asymmetric weights
``weight_zero_point`` int32 ``[ceil(N * bits / 32), K/g]`` with words along N, or int8 ``[N, K/g]``;
``weight_g_idx`` int32 ``[K]`` where activations were reordered (-1 everywhere: they were not).
Codes and zero points are signed, stored plus ``2 ** (bits - 1)``.

Source: package compressed-tensors 0.20.0, ``compressors/pack_quantized``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.formats import bitstream
from effllm.formats.grouped import GroupedWeight, checked_groups


def decode(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    g_idx: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> GroupedWeight:
    """``W[n, k] = (q[n, k] - z[n, group(k)]) * scale[n, group(k)]``.

    Args:
        packed: int32 ``[N, ceil(K * bits / 32)]``.
        scale: float ``[N, G]``.
        zero_point: int32 ``[ceil(N * bits / 32), G]``, int8 ``[N, G]`` or None.
        g_idx: int ``[K]`` or None.
        bits: 2 to 8.
        group_size: g, or -1 for K.
        in_features: K.

    Raises:
        ValueError: a dtype or shape that does not follow, or a ``g_idx`` outside of the groups.
    """
    n, num_groups = scale.shape
    group_size = in_features if group_size == -1 else group_size
    zeros = None
    if zero_point is not None and zero_point.dtype == torch.int8:
        zeros = (zero_point.int() + (1 << (bits - 1))).to(torch.uint8)
    elif zero_point is not None:
        zeros = bitstream.unpack(zero_point.T, bits, n).T.contiguous()
    if g_idx is not None and bool((g_idx == -1).all()):
        g_idx = None
    if g_idx is not None:
        g_idx = checked_groups(g_idx, num_groups, in_features, group_size)
    codes = bitstream.unpack(packed, bits, in_features)
    return GroupedWeight(codes, scale, zeros, bits, group_size, g_idx)


def encode(weight: GroupedWeight) -> dict[str, Tensor]:
    """``weight_packed``, ``weight_scale``, ``weight_shape`` and, asymmetric, the zero points.

    Raises:
        ValueError: groups out of order (current readers take no ``weight_g_idx``), K % g != 0, or
            a zero point that does not fit in the bits.
    """
    n, k = weight.codes.shape
    if weight.g_idx is not None:
        raise ValueError(
            "compressed-tensors has dropped weights whose input channels are reordered (act-order)"
        )
    if k % weight.group_size:
        raise ValueError(
            f"compressed-tensors needs K % group_size == 0, got K = {k}, "
            f"group_size = {weight.group_size}"
        )
    tensors = {
        "weight_packed": bitstream.pack(weight.codes, weight.bits),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor([n, k]),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = bitstream.pack(weight.zeros.T, weight.bits).T.contiguous()
    return tensors
