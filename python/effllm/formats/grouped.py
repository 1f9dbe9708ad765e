"""GroupedWeight: what every integer format says of one weight, and how the int4 kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KERNEL_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class GroupedWeight:
    """``W[n, k] = (codes[n, k] - zeros[n, group(k)]) * scales[n, group(k)]``.

    Attributes:
        codes: uint8 ``[N, K]`` below ``2 ** bits``.
        scales: float ``[N, G]``.
        zeros: uint8 ``[N, G]``; None means ``2 ** (bits - 1)`` everywhere.
        bits: 1 to 8.
        group_size: g with ``group(k) = k // g`` where there is no ``g_idx``.
        g_idx: int64 ``[K]`` in 0..G-1, the group of each input channel; None where in order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    g_idx: Tensor | None = None

    @property
    def groups(self) -> Tensor:
        """int64 ``[K]``: the group of each input channel."""
        if self.g_idx is not None:
            return self.g_idx
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def dequantize(self) -> Tensor:
        """The weight, fp32 ``[N, K]``."""
        groups = self.groups
        values = self.codes.float()
        if self.zeros is None:
            values -= 1 << (self.bits - 1)
        else:
            values -= self.zeros.float()[:, groups]
        return values.mul_(self.scales.float()[:, groups])


@dataclass(frozen=True)
class KernelGroups:
    """How the columns of a weight become sequential groups of a size that the kernels take.

    Attributes:
        group_size: 32, 64, 128 or K.
        perm: int32 ``[K]``, the input channel that each column comes from; None where in order.
        take: int64 ``[ceil(K / group_size)]``, the stored group that each kernel group belongs to.
    """

    group_size: int
    perm: Tensor | None
    take: Tensor


def kernel_groups(groups: Tensor) -> KernelGroups | None:
    """Sorts input channels by their group; None if no group size of the kernels fits the result.

    The order within a group is kept (a stable sort), so that equal weights give equal bytes. A
    group of another size is split where 32 divides it: its parts repeat the scale, which is exact.

    Args:
        groups: int64 ``[K]``, the group of each input channel, K >= 1.
    """
    k = groups.numel()
    ordered, order = torch.sort(groups, stable=True)
    starts = (ordered[1:] != ordered[:-1]).nonzero().flatten() + 1
    for group_size in (k, *KERNEL_GROUP_SIZES):
        if not (starts % group_size).any():
            in_order = torch.equal(order, torch.arange(k, device=order.device))
            perm = None if in_order else order.int()
            return KernelGroups(group_size, perm, ordered[::group_size])
    return None


def int4_tensors(
    weight: GroupedWeight, groups: KernelGroups
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points as ``Int4Linear`` holds them, columns permuted.

    A weight of fewer bits keeps its codes; if all its zero points are in the middle, codes are
    shifted so that the middle is 8 and no zero points are stored. Both are exact.

    Returns:
        codes uint8 ``[N, K]`` in 0..15, scales ``[N, ceil(K/g)]`` in the dtype they have, zeros
        uint8 ``[N, ceil(K/g)]`` or None (all 8).
    """
    codes = weight.codes if groups.perm is None else weight.codes.index_select(1, groups.perm)
    middle = 1 << (weight.bits - 1)
    zeros = weight.zeros
    if zeros is None or bool((zeros == middle).all()):
        codes = codes if middle == 8 else codes + (8 - middle)
        return codes, weight.scales[:, groups.take].contiguous(), None
    return (
        codes,
        weight.scales[:, groups.take].contiguous(),
        zeros[:, groups.take].contiguous(),
    )


def checked_groups(
    g_idx: Tensor, num_groups: int, in_features: int, group_size: int
) -> Tensor | None:
    """``g_idx`` as int64 in 0..G-1; None if it only says ``k // g``.

    Raises:
        ValueError: it is not an integer ``[K]``, or out of range.
    """
    if g_idx.is_floating_point() or list(g_idx.shape) != [in_features]:
        raise ValueError(
            f"g_idx must be int [{in_features}], got {g_idx.dtype} {list(g_idx.shape)}"
        )
    groups = g_idx.long()
    groups = torch.where(groups < 0, groups + num_groups, groups)
    if bool(((groups < 0) | (groups >= num_groups)).any()):
        raise ValueError(
            f"g_idx must be in -{num_groups}..{num_groups - 1}, "
            f"got {int(g_idx.min())}..{int(g_idx.max())}"
        )
    in_order = torch.arange(in_features, device=groups.device) // group_size
    return None if torch.equal(groups, in_order) else groups
