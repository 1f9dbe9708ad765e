"""Sparse weights of compressed-tensors: the values that are kept, and a bit for each that may be.

On disk, ``sparse-24-bitmask``: ``compressed`` ``[N, K / 2]``, the kept values in row order, of the
weight's dtype or of its codes; ``bitmask`` uint8 ``[N, ceil(K / 8)]``, low bit first; ``shape``
int64 ``[2, 1]``. ``sparse-bitmask`` has ``compressed`` in one dimension, ``shape`` ``[2]`` and
``row_offsets``, which follow from the bits. Which values are kept is what the bits say, not which
are large: e4m3 values were compared as integers.

Source: package compressed-tensors 0.12.2 (``compressors/sparse_compressors``); later ones have
dropped both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decode(compressed: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    """The weight ``[N, K]`` of the dtype of ``compressed``, 0 where no bit is set.

    Args:
        compressed: the kept values, any shape.
        bitmask: uint8 ``[N, ceil(K / 8)]``.
        in_features: K.

    Raises:
        ValueError: there are not as many values as bits.
    """
    bits = (bitmask[..., None] >> torch.arange(8, device=bitmask.device)) & 1
    mask = bits.flatten(1)[:, :in_features].bool()
    if int(mask.sum()) != compressed.numel():
        raise ValueError(
            f"bitmask must have one bit for each of {compressed.numel()} values, "
            f"got {int(mask.sum())}"
        )
    values = compressed.flatten()
    # As integers: torch copies e4m3 but does not scatter it.
    plain = values.view(torch.int8) if values.element_size() == 1 else values
    dense = plain.new_zeros(mask.shape)
    dense[mask] = plain
    return dense.view(values.dtype)
