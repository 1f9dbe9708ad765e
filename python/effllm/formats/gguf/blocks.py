"""The blocks of GGUF tensors: to fp32 exactly, from float for those that are written, and to and
from the 4-bit codes of effllm where nothing is lost.

Every decoder takes ``[blocks, bytes]`` uint8 and gives ``[blocks, values]`` fp32. Codes and scales
have so few bits that all products below are exact in fp32; a result is rounded once, in the last
addition, or not at all. That makes any order of the operations right to the bit.

Source: the block structs and reference quantisers of ggml (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod

import torch
from torch import Tensor

from effllm.formats.gguf.layout import BLOCK_TYPES, join, nibble_runs, nibbles, split
from effllm.formats.gguf.spec import GgufError, TensorType
from effllm.nn.gguf_linear import BlockType, dequantize_blocks, k_scales
from effllm.quantization.k_blocks import search_blocks

# Blocks that are converted at once.
_PIECE = 1 << 13

_NO_SCALE = "values are not finite, or too large for a scale of {}"
# Where blocks have numbers that values too large for them make infinite.
_CHECKED = {TensorType.Q4_0: (0,), TensorType.Q4_1: (0, 2), TensorType.Q8_0: (0,)}

_FLOATS = {
    TensorType.F32: torch.float32,
    TensorType.F16: torch.float16,
    TensorType.BF16: torch.bfloat16,
}


def dequantize(
    raw: Tensor,
    tensor_type: TensorType,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values of a tensor.

    Args:
        raw: uint8, the stored bytes, as ``GgufFile.raw`` gives them.
        tensor_type: one of ``DECODED``.
        shape: in PyTorch's order.
        dtype: of the result; others than fp32 are rounded from it.

    Returns:
        ``dtype`` ``shape``, in memory of its own, on the device of ``raw``.

    Raises:
        GgufError: the type has no decoder, or ``raw`` is not uint8 of the size that type and shape
            need.
    """
    blocks = as_blocks(raw, tensor_type, shape)
    if tensor_type in _FLOATS:
        return blocks.contiguous().view(_FLOATS[tensor_type]).to(dtype, copy=True).view(shape)
    if tensor_type not in _DECODERS:
        raise GgufError(f"type {tensor_type.name} has no decoder, only {names(DECODED)} have")
    out = blocks.new_empty((blocks.shape[0], tensor_type.block_values), dtype=dtype)
    for source, target in _pieces(blocks, out):
        target.copy_(_DECODERS[tensor_type](source))
    return out.view(shape)


def quantize(weight: Tensor, tensor_type: TensorType) -> Tensor:
    """The bytes of a tensor, the inverse of ``dequantize`` as far as the type allows.

    Q4_0, Q4_1 and Q8_0 round as ggml's reference does, to the bit (but for the codes of a scale so
    small that it is stored as 0, which ggml leaves to chance); Q4_K and Q6_K search for scales of
    less error than ggml's (see ``quantization.k_blocks``); F16 and BF16 round to nearest.

    Args:
        weight: float, any shape; its last dimension a multiple of the type's block.
        tensor_type: one of ``ENCODED``.

    Returns:
        uint8 ``[bytes]``, on the device of ``weight``.

    Raises:
        GgufError: the type has no encoder, the last dimension does not fit, values are too large
            for the type (or for its scales), or a quantised type gets NaN or infinity.
    """
    if tensor_type not in ENCODED:
        raise GgufError(f"type {tensor_type.name} has no encoder, only {names(ENCODED)} have")
    if not weight.is_floating_point():
        raise GgufError(f"only float tensors can be stored as {tensor_type.name}: {weight.dtype}")
    values = weight.detach().contiguous()
    if tensor_type in _FLOATS:
        stored = values.to(_FLOATS[tensor_type]).flatten()
        if (torch.isfinite(values).flatten() & ~torch.isfinite(stored)).any():
            raise GgufError(f"values are too large for {tensor_type.name}")
        return stored.view(torch.uint8)
    size = values.shape[-1] if values.dim() else 1
    if size % tensor_type.block_values:
        raise GgufError(
            f"rows of {size} values cannot be stored as {tensor_type.name}, which needs a "
            f"multiple of {tensor_type.block_values}"
        )
    rows = values.view(-1, tensor_type.block_values)
    out = rows.new_empty((rows.shape[0], tensor_type.block_bytes), dtype=torch.uint8)
    for source, target in _pieces(rows, out):
        target.copy_(_ENCODERS[tensor_type](source.float()))
    starts = _CHECKED.get(tensor_type, ())
    if not all(torch.isfinite(_float(out, start, torch.float16)).all() for start in starts):
        raise GgufError(_NO_SCALE.format(tensor_type.name))
    return out.flatten()


def _pieces(source: Tensor, target: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Matching blocks of both, a few megabytes at a time: what is computed on the way from bytes to
    values is several times their size, too much for a whole embedding."""
    if not source.numel():
        return ()
    return zip(source.split(_PIECE), target.split(_PIECE), strict=True)


def as_blocks(raw: Tensor, tensor_type: TensorType, shape: tuple[int, ...]) -> Tensor:
    """``raw`` as ``[blocks, bytes per block]``, after checking its size; see ``dequantize``."""
    num_blocks, rest = divmod(prod(shape), tensor_type.block_values)
    needed = num_blocks * tensor_type.block_bytes
    if rest or raw.dtype != torch.uint8 or raw.numel() != needed:
        raise GgufError(
            f"{tensor_type.name} {list(shape)} needs {needed} bytes and a multiple of "
            f"{tensor_type.block_values} values, got {raw.numel()} of {raw.dtype}"
        )
    return raw.reshape(num_blocks, tensor_type.block_bytes)


def to_int4(
    raw: Tensor, tensor_type: TensorType, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The same weights as codes, scales and zeros: ``w = (code - zero) * scale``, groups of 32.

    A block of Q4_0 is such a group as it stands, with zero point 8. A block of Q4_1 holds
    ``code * d + m``; that has our form only if ``m = -zero * d`` for a whole ``zero`` in 0..255, or
    if d = 0 and all its values are m, which is ``(8 - 7) * m``. As d and m are rounded apart, most
    files have blocks without either, and then the tensor as a whole has no exact form: None.

    Args:
        raw: as for ``dequantize``.
        tensor_type: Q4_0 or Q4_1; None is returned for others.
        shape: ``(N, K)``.

    Returns:
        codes uint8 ``[N, K]`` in 0..15, to be packed by ``int4_pack``; scales fp16 ``[N, K/32]``;
        zeros uint8 ``[N, K/32]``, or None for Q4_0: 8. All three have memory of their own.
    """
    if tensor_type not in (TensorType.Q4_0, TensorType.Q4_1):
        return None
    blocks = as_blocks(raw, tensor_type, shape)
    groups = (shape[0], shape[1] // 32)
    scales = blocks[:, 0:2].clone(memory_format=torch.contiguous_format).view(torch.float16)
    if tensor_type == TensorType.Q4_0:
        return nibbles(blocks[:, 2:18]).view(shape), scales.view(groups), None
    codes = nibbles(blocks[:, 4:20])
    d, m = scales.float(), _float(blocks, 2, torch.float16)
    constant = d == 0
    zeros = torch.where(constant, 7.0, torch.round(-m / d))
    # A product of 11 and 8 bits is exact; NaN and infinity fail the comparison or the range.
    exact = constant | ((zeros >= 0) & (zeros <= 255) & (zeros * d == -m))
    if not (exact.all() and torch.isfinite(m).all() and torch.isfinite(d).all()):
        return None
    codes = torch.where(constant, 8, codes)
    scales = torch.where(constant, m.half(), scales)
    return codes.view(shape), scales.view(groups), zeros.to(torch.uint8).view(groups)


def to_blocks(
    raw: Tensor, tensor_type: TensorType, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Codes and headers of Q8_0, Q4_K or Q6_K, as ``GgufLinear.from_codes`` takes them.

    Both have memory of their own; see ``dequantize`` for arguments and errors.
    """
    parts = split(as_blocks(raw, tensor_type, shape), BLOCK_TYPES[tensor_type])
    codes, headers = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return codes.view(shape), headers.view(shape[0], -1)


def from_blocks(codes: Tensor, headers: Tensor, tensor_type: TensorType) -> Tensor:
    """The bytes of Q8_0, Q4_K or Q6_K: the inverse of ``to_blocks``."""
    values = codes.view(-1, tensor_type.block_values)
    return join(values, headers.view(len(values), -1), BLOCK_TYPES[tensor_type]).flatten()


def from_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The bytes of Q4_0, or with zero points of Q4_1: the inverse of ``to_int4``.

    A block of Q4_1 stores the minimum ``-zero * scale`` as fp16. Where that is no fp16 number, a
    block of equal codes is stored as its value alone.

    Args:
        codes: uint8 ``[N, K]`` in 0..15, K a multiple of 32.
        scales: fp16 ``[N, K/32]``.
        zeros: uint8 ``[N, K/32]``; None means 8, and Q4_0.

    Raises:
        GgufError: other shapes or dtypes, scales of another dtype would have to be rounded; or a
            minimum would have to be.
    """
    n, k = codes.shape
    name = "Q4_0" if zeros is None else "Q4_1"
    if k % 32 or codes.dtype != torch.uint8:
        raise GgufError(f"{name} needs uint8 codes [N, 32 * G], got {codes.dtype} [{n}, {k}]")
    _check_groups(name, "scales", scales, torch.float16, (n, k // 32))
    blocks, d = codes.reshape(-1, 32), scales.reshape(-1, 1)
    if zeros is None:
        return _nibble_blocks(blocks, d).flatten()
    _check_groups(name, "zeros", zeros, torch.uint8, (n, k // 32))
    zeros = zeros.reshape(-1, 1).float()
    # Products of 8 and 11 bits are exact in fp32.
    m, value = -zeros * d.float(), (blocks[:, :1].float() - zeros) * d.float()
    constant = m.half().float() != m
    equal = (blocks == blocks[:, :1]).all(1, keepdim=True)
    if (constant & ~(equal & (value.half().float() == value))).any():
        raise GgufError("Q4_1 needs zero points whose products with the scales are fp16 numbers")
    return _nibble_blocks(
        blocks, torch.where(constant, 0, d), torch.where(constant, value, m).half()
    ).flatten()


def _check_groups(
    name: str, what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        kind = str(dtype).removeprefix("torch.")
        raise GgufError(
            f"{name} needs {kind} {what} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )


def _float(blocks: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """The float stored from byte ``start`` on, as fp32 ``[blocks, 1]``."""
    return blocks[:, start : start + dtype.itemsize].contiguous().view(dtype).float()


def _bits(packed: Tensor) -> Tensor:
    """``[..., n]`` bytes -> ``[..., 8n]`` bits, the lowest of each byte first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)


def _q4_0(blocks: Tensor) -> Tensor:
    """18 bytes, 32 values ``(code - 8) * d``:

    0    2                                            18
    | d  | codes 0..15 low, codes 16..31 high nibbles |
    """
    return (nibbles(blocks[:, 2:18]).float() - 8) * _float(blocks, 0, torch.float16)


def _q4_1(blocks: Tensor) -> Tensor:
    """20 bytes, 32 values ``code * d + m``:

    0    2    4                  20
    | d  | m  | codes as in Q4_0 |
    """
    d, m = _float(blocks, 0, torch.float16), _float(blocks, 2, torch.float16)
    return nibbles(blocks[:, 4:20]).float() * d + m


def _q5_0(blocks: Tensor) -> Tensor:
    """22 bytes, 32 values ``(code - 16) * d``; bit i of ``high`` is the fifth bit of code i:

    0    2      6                      22
    | d  | high | low bits as in Q4_0  |
    """
    codes = nibbles(blocks[:, 6:22]) | (_bits(blocks[:, 2:6]) << 4)
    return (codes.float() - 16) * _float(blocks, 0, torch.float16)


def _q5_1(blocks: Tensor) -> Tensor:
    """24 bytes, 32 values ``code * d + m``:

    0    2    4      8                      24
    | d  | m  | high | low bits as in Q4_0  |
    """
    codes = nibbles(blocks[:, 8:24]) | (_bits(blocks[:, 4:8]) << 4)
    d, m = _float(blocks, 0, torch.float16), _float(blocks, 2, torch.float16)
    return codes.float() * d + m


def _q5_k(blocks: Tensor) -> Tensor:
    """176 bytes, as Q4_K; bit j of ``high[l]`` is the fifth bit of value l in sub-block j:

    0                  16            48                            176
    | see k_scales     | high[0..31] | low bits, see nibble_runs   |
    """
    scales, minima = (part.float().unsqueeze(-1) for part in k_scales(blocks))
    d, dmin = (_float(blocks, start, torch.float16).unsqueeze(-1) for start in (0, 2))
    high = _bits(blocks[:, 16:48]).view(-1, 32, 8).transpose(1, 2)
    codes = nibble_runs(blocks[:, 48:176]) | (high << 4)
    return (codes.float() * (scales * d) - minima * dmin).flatten(1)


def _block_values(blocks: Tensor, tensor_type: BlockType) -> Tensor:
    return dequantize_blocks(*split(blocks, tensor_type), tensor_type)


def _searched(values: Tensor, tensor_type: BlockType) -> Tensor:
    """Scales as ``GgufConfig`` finds them where no inputs are known; see ``quantize``."""
    if not (values.abs() <= torch.finfo(torch.float16).max).all():
        raise GgufError(_NO_SCALE.format(tensor_type.upper()))
    return join(*search_blocks(values, tensor_type), tensor_type)


def _to_q4_0(values: Tensor) -> Tensor:
    """d is the value of largest magnitude over -8: that value gets code 0 and is kept, rounding of
    d to fp16 apart. The first of equals is taken, and codes are rounded with d in fp32."""
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    d = largest / -8
    codes = (values * _reciprocal(d) + 8.5).clamp(0, 15).to(torch.uint8)
    return _nibble_blocks(codes, d.half())


def _to_q4_1(values: Tensor) -> Tensor:
    """d is a 15th of the range and m the minimum; codes are rounded with both in fp32."""
    low, high = values.aminmax(dim=1, keepdim=True)
    d = (high - low) / 15
    codes = ((values - low) * _reciprocal(d) + 0.5).clamp(0, 15).to(torch.uint8)
    return _nibble_blocks(codes, d.half(), low.half())


def _to_q8_0(values: Tensor) -> Tensor:
    """d is the largest magnitude over 127; halves are rounded away from zero, as C does."""
    d = values.abs().amax(1, keepdim=True) / 127
    scaled = values * _reciprocal(d)
    codes = scaled.trunc() + scaled.sign() * (scaled.frac().abs() >= 0.5)
    return torch.cat([d.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)], 1)


def _nibble_blocks(codes: Tensor, *floats: Tensor) -> Tensor:
    """fp16 ``[blocks, 1]`` each, and then the codes."""
    low, high = codes.chunk(2, 1)
    starts = [number.contiguous().view(torch.uint8) for number in floats]
    return torch.cat([*starts, low | (high << 4)], 1)


def _reciprocal(d: Tensor) -> Tensor:
    """1/d, and 0 where that is no number: such a d is 0 in fp16, and its codes do not matter."""
    inverse = 1 / d
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


_DECODERS: dict[TensorType, Callable[[Tensor], Tensor]] = {
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: partial(_block_values, tensor_type="q8_0"),
    TensorType.Q4_K: partial(_block_values, tensor_type="q4_k"),
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: partial(_block_values, tensor_type="q6_k"),
}
_ENCODERS: dict[TensorType, Callable[[Tensor], Tensor]] = {
    TensorType.Q4_0: _to_q4_0,
    TensorType.Q4_1: _to_q4_1,
    TensorType.Q8_0: _to_q8_0,
    TensorType.Q4_K: partial(_searched, tensor_type="q4_k"),
    TensorType.Q6_K: partial(_searched, tensor_type="q6_k"),
}

DECODED: tuple[TensorType, ...] = (*_FLOATS, *_DECODERS)
"""Types whose values can be had."""

ENCODED: tuple[TensorType, ...] = (*_FLOATS, *_ENCODERS)
"""Types that can be written."""


def names(types: tuple[TensorType, ...]) -> str:
    """For messages: "F32, F16, ..."."""
    return ", ".join(kind.name for kind in types)
