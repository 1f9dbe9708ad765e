"""Codes of 1 to 8 bits in 32-bit words: one little-endian bit stream along the last dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_words(count: int, bits: int) -> int:
    """Words that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of each row.

    Code i of a row is bits ``i * bits`` to ``(i + 1) * bits - 1`` of the row's words read as one
    little-endian number, so a code of 3 bits may straddle two words.

    Args:
        words: int32 ``[..., ceil(count * bits / 32)]``, any strides.
        bits: 1 to 8.
        count: codes per row.

    Returns:
        uint8 ``[..., count]``, contiguous.

    Raises:
        ValueError: the words are not int32, or not as many per row.
    """
    if words.dtype != torch.int32 or words.shape[-1] != num_words(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits must be int32 [..., {num_words(count, bits)}], "
            f"got {words.dtype} {list(words.shape)}"
        )
    if 8 % bits == 0:
        # No code straddles two bytes, and bytes need no 32-bit arithmetic. Little-endian hosts
        # only, as safetensors files of torch are.
        bytes_ = words.contiguous().view(torch.uint8)
        parts = [(bytes_ >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)[..., :count].contiguous()
    codes_per_period, words_per_period = _period(bits)
    periods = -(-words.shape[-1] // words_per_period)
    padding = periods * words_per_period - words.shape[-1]
    words = torch.nn.functional.pad(words, (0, padding)).unflatten(-1, (periods, words_per_period))
    codes = words.new_empty((*words.shape[:-1], codes_per_period), dtype=torch.uint8)
    for i in range(codes_per_period):
        word, shift = divmod(i * bits, 32)
        # The right shift brings in sign bits, which the mask takes away again.
        code = words[..., word] >> shift
        if shift + bits > 32:
            code = (code & ((1 << (32 - shift)) - 1)) | (words[..., word + 1] << (32 - shift))
        codes[..., i] = code & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].contiguous()


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of ``unpack``; bits past the last code are 0.

    Args:
        codes: uint8 ``[..., count]``, each below ``2 ** bits``.
        bits: 1 to 8.

    Returns:
        int32 ``[..., ceil(count * bits / 32)]``, contiguous.

    Raises:
        ValueError: the codes are not uint8, or one does not fit.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes must fit in {bits} bits, got {int(codes.max())}")
    count = codes.shape[-1]
    codes_per_period, words_per_period = _period(bits)
    periods = -(-count // codes_per_period)
    padding = periods * codes_per_period - count
    codes = torch.nn.functional.pad(codes, (0, padding)).unflatten(-1, (periods, codes_per_period))
    words = codes.new_zeros((*codes.shape[:-1], words_per_period), dtype=torch.int32)
    for i in range(codes_per_period):
        word, shift = divmod(i * bits, 32)
        code = codes[..., i].int()
        words[..., word] |= code << shift
        if shift + bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    return words.flatten(-2)[..., : num_words(count, bits)].contiguous()


def _period(bits: int) -> tuple[int, int]:
    """After how many codes, and words, the pattern of shifts repeats."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common
