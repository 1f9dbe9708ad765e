"""Codes of one byte each with a scale per block: compressed-tensors' plain formats, and FP8.

On disk, compressed-tensors ``float-quantized``, ``int-quantized`` and ``naive-quantized``:
``weight`` float8_e4m3fn or int8 ``[N, K]``; ``weight_scale`` ``[1]``, ``[N, 1]``, ``[N, K/g]`` or
one per block of rows and columns; ``weight_zero_point`` int8 of the same shape for asymmetric
weights; ``input_scale``, which weights do without. Hugging Face's fine-grained FP8: ``weight``
float8_e4m3fn, ``weight_scale_inv`` (a factor despite its name) one per block or one value, as
float32 or as bare exponents (ue8m0); ``activation_scale``.

Source: packages compressed-tensors 0.20.0 (``compressors/naive_quantized``) and transformers 5.24.0
(``integrations/finegrained_fp8.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def exponents(scale: Tensor) -> Tensor:
    """Scales stored as ue8m0: uint8 or float8_e8m0fnu bytes b -> fp32 ``2 ** (b - 127)``.

    255 is NaN, as the type has it.
    """
    stored = scale.view(torch.uint8).int()
    # An fp32 number of exponent b and no fraction; b = 0 would be 0, and is 2 ** -127.
    values = (stored << 23).view(torch.float32)
    values = torch.where(stored == 0, 2.0**-127, values)
    return torch.where(stored == 255, torch.nan, values)


def decode(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, rows: int, columns: int
) -> Tensor:
    """``W[n, k] = (codes[n, k] - z[n // rows, k // columns]) * scale[n // rows, k // columns]``.

    Args:
        codes: int8 or float8_e4m3fn ``[N, K]``.
        scale: float ``[ceil(N / rows), ceil(K / columns)]``; the last blocks may be short.
        zero_point: int8 of the same shape, or None.
        rows: of a block.
        columns: of a block.

    Returns:
        fp32 ``[N, K]``.
    """
    n, k = codes.shape
    rows, columns = min(rows, n), min(columns, k)  # a config may say anything

    def spread(values: Tensor) -> Tensor:
        values = values.float().repeat_interleave(rows, 0)[:n]
        return values.repeat_interleave(columns, 1)[:, :k]

    values = codes.float()
    if zero_point is not None:
        values -= spread(zero_point)
    return values.mul_(spread(scale))
