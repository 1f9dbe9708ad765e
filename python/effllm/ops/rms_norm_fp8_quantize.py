"""rms_norm_fp8_quantize: the norm before a linear layer, as e4m3 codes and scales."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from .silu_mul_fp8_quantize import codes_and_scales_ref, empty_codes_and_scales

_op = ops.rms_norm_fp8_quantize.default


def rms_norm_fp8_quantize(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise ``rms_norm(x) * weight`` to e4m3: ``rms_norm(x) * weight ~ xq * scales``.

    The norm is that of a Hugging Face LlamaRMSNorm: x / sqrt(mean(x^2) + eps) is found in fp32 and
    rounded to the dtype of x, and so is its product with the weight. Codes and scales are what
    `fp8_quantize` makes of it, NaN and infinity included, or `fp8_quantize_tensor` by a known
    scale. Bits are the same on every device: the order in which squares are summed depends on K
    alone. The norm never goes to memory: the time is that of reading x.

    Args:
        x: [..., K], fp16, bf16 or fp32. Rows may have any strides: no copy is made unless
            neighbours in a row are apart.
        weight: [K], dtype of x, contiguous.
        scale: one element of any shape and float dtype, as [1] of fp32: a known scale of all rows
            ("static", of calibration); None: scales are found.
        eps: added to the mean of squares; finite, at least 0.
        group_size: 128, columns that share a scale, of which the last may be fewer; None is one
            scale per row.

    Returns:
        xq [..., K], e4m3 (torch.float8_e4m3fn), contiguous, and scales in fp32, laid out as those
        of `fp8_quantize`: [..., ceil(K/128)], or [..., 1] without groups; by a known scale that
        scale, [1].

    Raises:
        RuntimeError: a wrong dtype, shape, stride or device, a wrong eps, another group size,
            groups beside a known scale, or a scale of several elements.

    Source:
        csrc/quant/rms_norm_rows.h. RMSNorm is of arXiv:1910.07467.
    """
    return _op(x, weight, scale, eps=eps, group_size=group_size)


@torch.library.register_fake(_op.name())
def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    return empty_codes_and_scales(x, scale, group_size)


refuse_backward(_op)


def _fold_halves(values: Tensor) -> Tensor:
    """[..., 2^n] to [...], by adding the second half to the first."""
    while values.shape[-1] > 1:
        first, second = values.chunk(2, dim=-1)
        values = first + second
    return values.squeeze(-1)


def sum_of_squares_ref(rows: Tensor) -> Tensor:
    """Plain PyTorch, fp32: [..., K] to [...], in the order of the op."""
    k = rows.shape[-1]
    lanes = min(max(1 << max(-(-k // 16) - 1, 0).bit_length(), 32), 512)
    padded = torch.nn.functional.pad(rows * rows, (0, -k % (8 * lanes) if k > 0 else 8 * lanes))
    sums = rows.new_zeros(*rows.shape[:-1], lanes // 32, 32, 8)
    for octets in padded.split(8 * lanes, dim=-1):
        sums = sums + octets.unflatten(-1, (lanes // 32, 32, 8))
    return _fold_halves(_fold_halves(_fold_halves(sums)))


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Plain PyTorch: the norm and its product with the weight, each rounded to the dtype of x."""
    values = x.float()
    # Tensors: torch multiplies by the reciprocal of a number, and adds it in float64.
    size, least = values.new_tensor(x.shape[-1]), values.new_tensor(eps)
    mean = sum_of_squares_ref(values).unsqueeze(-1) / size
    rms = (mean + least).double().sqrt().float()  # that of fp32 does not round to nearest
    normalised = values * (1 / rms)
    return (normalised.to(x.dtype).float() * weight.float()).to(x.dtype)


def rms_norm_fp8_quantize_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch."""
    return codes_and_scales_ref(rms_norm_ref(x, weight, eps), scale, group_size)
