"""What linear layers over packed 4-bit codes share."""

from __future__ import annotations

from typing import Any

import torch

from effllm.nn.quantized_linear import QuantizedLinear, ceil_div, frozen

# Sizes of the packed layout: one row of `qweight` per strip of 64 output channels, 512 words per
# 64 input channels of a strip.
_TILE = 64
_WORDS_PER_TILE = 512

GROUP_SIZES = (32, 64, 128)


def packed_shape(n: int, k: int) -> tuple[int, int]:
    """Of the int32 words that ``int4_pack`` makes of codes ``[n, k]``."""
    return ceil_div(n, _TILE), ceil_div(k, _TILE) * _WORDS_PER_TILE


def resolve_group_size(group_size: int, in_features: int) -> int:
    """The group size that the ops get: -1 stands for one group over all input channels.

    Only 32, 64, 128 and K itself are allowed, so that the shape of the scales always tells the
    grouping and a state dict needs no entry for it.
    """
    resolved = in_features if group_size == -1 else group_size
    if resolved not in (*GROUP_SIZES, in_features):
        raise ValueError(
            f"group_size must be 32, 64, 128 or -1 (= in_features, {in_features}), got {group_size}"
        )
    return resolved


class PackedLinear(QuantizedLinear):
    """A quantised layer over packed 4-bit codes, with groups of g = group_size input channels.

    Holds ``qweight`` as the packed layout has it, and ``bias``; a subclass adds what makes weights
    of the codes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.group_size = resolve_group_size(group_size, in_features)
        self.num_groups = ceil_div(in_features, self.group_size)
        shape = packed_shape(out_features, in_features)
        self.qweight = frozen(torch.zeros(shape, device=device, dtype=torch.int32))

    @property
    def options(self) -> dict[str, Any]:
        return {"group_size": self.group_size}
