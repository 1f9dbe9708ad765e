"""Round-to-nearest 4-bit codes of one weight matrix, group by group along the input channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_CODE = 15
_SYMMETRIC_ZERO = 8


def round_to_nearest(
    weight: Tensor, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points with ``weight ~ (code - zero) * scale``.

    Args:
        weight: float ``[N, K]``.
        group_size: input channels per scale; the last group of a row may be short.
        symmetric: scale = amax / 7.5 and zero = 8. Otherwise scale = (max - min) / 15 over the
            group and 0 (so that the zero point is one of the codes and 0 stays exact).

    Returns:
        codes uint8 ``[N, K]`` in 0..15, scales ``[N, G]`` in the weight's dtype, zeros uint8
        ``[N, G]`` or None when symmetric, with G = ceil(K / group_size).

    Raises:
        ValueError: the weight is not a float matrix with data, or holds NaN or infinity.
    """
    check_weight(weight)

    n, k = weight.shape
    num_groups = -(-k // group_size)
    # Padding with 0 changes no maximum of |w| and no range that includes 0.
    padded = F.pad(weight.float(), (0, num_groups * group_size - k))
    groups = padded.view(n, num_groups, group_size)
    if symmetric:
        scales = groups.abs().amax(-1) / 7.5
    else:
        low = groups.amin(-1).clamp(max=0)
        scales = (groups.amax(-1).clamp(min=0) - low) / _MAX_CODE

    # The codes are rounded with the scale as it is stored. A group of zeros, or one whose scale is
    # too small for the dtype, gets the scale 1: a 0 would give 0/0 here.
    scales = scales.to(weight.dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    step = scales.float()
    zeros = None
    offset: Tensor | int = _SYMMETRIC_ZERO
    if not symmetric:
        offset = torch.round(-low / step).clamp(0, _MAX_CODE).unsqueeze(-1)
        zeros = offset.squeeze(-1).to(torch.uint8)
    codes = (torch.round(groups / step.unsqueeze(-1)) + offset).clamp(0, _MAX_CODE)
    return codes.view(n, -1)[:, :k].to(torch.uint8).contiguous(), scales, zeros


def check_weight(weight: Tensor) -> None:
    """Raises ValueError unless it is a float matrix with data, all of it finite."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix, got {weight.dtype} {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError("weight is on the meta device; load it before quantising")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity")
