"""4-bit codes of a weight matrix by the nearest entry of a codebook, and the codebook of NF4."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effllm.quantization.round_to_nearest import check_weight

NF4: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4: quantiles of the normal distribution scaled to [-1, 1], with an exact 0, for
weights divided by their group's largest magnitude (QLoRA, arXiv:2305.14314, appendix E)."""


def round_to_codebook(
    weight: Tensor, codebook: Tensor, group_size: int, scaled: bool
) -> tuple[Tensor, Tensor | None]:
    """Codes and scales with ``weight ~ codebook[..., code] * scale``.

    Args:
        weight: float ``[N, K]``.
        codebook: finite float ``[16]``, ``[N, 16]`` or ``[N, G, 16]``, in any order, with
            G = ceil(K / group_size).
        group_size: input channels per scale and codebook; the last group of a row may be short.
        scaled: divide each group by its largest magnitude before rounding. Otherwise the codebook
            is in the weight's own units, and there are no scales.

    Returns:
        codes uint8 ``[N, K]`` in 0..15, and scales ``[N, G]`` in the weight's dtype or None. Of two
        entries equally near, the lower one is taken.

    Raises:
        ValueError: the weight is not a float matrix with data, or the codebook has another shape
            than those; or either holds NaN or infinity.
    """
    check_weight(weight)
    n, k = weight.shape
    num_groups = -(-k // group_size)
    check_codebook(codebook, n, num_groups)
    if not torch.isfinite(codebook).all():
        raise ValueError("codebook holds NaN or infinity")

    # Padding with 0 changes no maximum of |w|.
    padded = F.pad(weight.float(), (0, num_groups * group_size - k))
    values = padded.view(n, num_groups, group_size)
    scales = None
    if scaled:
        # The codes are rounded with the scale as it is stored. A group of zeros, or one whose scale
        # is too small for the dtype, gets the scale 1: a 0 would give 0/0 here.
        scales = values.abs().amax(-1).to(weight.dtype)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        values = values / scales.float().unsqueeze(-1)

    entries, order = codebook.to(weight.device, torch.float32).sort(-1)
    bounds = (entries[..., 1:] + entries[..., :-1]) / 2
    if codebook.dim() == 1:
        codes = order[torch.bucketize(values, bounds)]
    else:
        if codebook.dim() == 2:
            values = values.flatten(1)
        codes = order.gather(-1, torch.searchsorted(bounds, values.contiguous()))
    return codes.view(n, -1)[:, :k].to(torch.uint8).contiguous(), scales


def check_codebook(codebook: Tensor, n: int, num_groups: int) -> None:
    """Raises ValueError unless it is a float ``[16]``, ``[n, 16]`` or ``[n, num_groups, 16]``."""
    shapes = ([16], [n, 16], [n, num_groups, 16])
    if list(codebook.shape) not in shapes or not codebook.is_floating_point():
        raise ValueError(
            "codebook must be float [16], [N, 16] or [N, ceil(K/g), 16] = "
            f"{shapes[0]}, {shapes[1]} or {shapes[2]}, got {codebook.dtype} {list(codebook.shape)}"
        )
