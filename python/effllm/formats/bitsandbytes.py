"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, and LLM.int8().

On disk, 4 bits: ``weight`` uint8 ``[ceil(N * K / 2), 1]`` (or the same bytes as another dtype), two
codes per byte, the first in the high bits; ``weight.quant_map`` fp32 ``[16]``; ``weight.absmax``,
the scale of each block, fp32, or with double quantisation uint8 codes into
``weight.nested_quant_map`` fp32 ``[256]``, scaled by ``weight.nested_absmax`` fp32 per
``nested_blocksize`` of them and shifted by ``nested_offset``; the sizes as JSON text in
``weight.quant_state.bitsandbytes__nf4`` or ``__fp4``, uint8. 8 bits: ``weight`` int8 ``[N, K]``,
``SCB`` fp32 ``[N]``, the magnitude that 127 stands for; ``weight_format`` uint8, 0 = rows.

Source: package bitsandbytes 0.50.2 (``functional.py``, ``nn/modules.py``, ``backends/default``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.formats.grouped import KERNEL_GROUP_SIZES
from effllm.quantization.codebook import NF4

# 4-bit floats of sign, exponent and fraction, 2 and 1 bits of them, over their largest.
FP4: tuple[float, ...] = tuple(
    sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)
_CODEBOOKS = {"nf4": NF4, "fp4": FP4}

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QuantState:
    """What ``quant_state`` says.

    Attributes:
        shape: (N, K).
        blocksize: values per absmax.
        nested_blocksize: absmax codes per nested absmax; None without double quantisation.
        nested_offset: added to each decoded absmax.
    """

    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float

    @property
    def num_blocks(self) -> int:
        """Blocks of the weight; the last may be short."""
        return -(-math.prod(self.shape) // self.blocksize)


def parse_state(text: bytes, quant_type: str) -> QuantState:
    """Raises ValueError for text that is no such JSON object, or of another type."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"quant_state must be JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"quant_state must be an object, got {type(state).__name__}")
    if state.get("quant_type") != quant_type:
        raise ValueError(f"quant_type must be {quant_type!r}, got {state.get('quant_type')!r}")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"shape must be [N, K], got {shape!r}")
    nested = None
    if state.get("nested_blocksize") is not None:
        nested = _size("nested_blocksize", state["nested_blocksize"])
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset must be a finite number, got {offset!r}")
    n, k = (_size("shape", size) for size in shape)
    return QuantState((n, k), _size("blocksize", state.get("blocksize")), nested, float(offset))


def _size(name: str, value: object) -> int:
    # An index that does not fit in 63 bits is not only wrong, it also has no tensor.
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def unnest(codes: Tensor, quant_map: Tensor, absmax: Tensor, state: QuantState) -> Tensor:
    """The absmax of each block, fp32, out of double quantisation.

    Args:
        codes: uint8 ``[blocks]``.
        quant_map: float ``[256]``.
        absmax: float ``[ceil(blocks / nested_blocksize)]``.
        state: with a ``nested_blocksize``.
    """
    assert state.nested_blocksize is not None
    count = codes.numel()
    scale = absmax.float().repeat_interleave(min(state.nested_blocksize, count))[:count]
    return quant_map.float()[codes.long()] * scale + state.nested_offset


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` 4-bit codes of uint8 bytes, uint8, the high bits of each byte first."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten()[:count]


def kernel_group_size(in_features: int, blocksize: int) -> int | None:
    """The group size with which the kernels see the blocks of a flattened weight.

    Blocks begin at multiples of ``gcd(K, blocksize)`` within a row. None: no group fits there.
    """
    step = math.gcd(in_features, blocksize)
    if step == in_features:
        return in_features
    return next((size for size in KERNEL_GROUP_SIZES if step % size == 0), None)


def group_scales(absmax: Tensor, state: QuantState, group_size: int) -> Tensor:
    """``[N, ceil(K / group_size)]``: the absmax of the block that each group is in."""
    n, k = state.shape
    row = torch.arange(n, device=absmax.device)[:, None] * k
    column = torch.arange(0, k, group_size, device=absmax.device)
    return absmax[(row + column) // state.blocksize]


def dequantize(codes: Tensor, quant_map: Tensor, absmax: Tensor, state: QuantState) -> Tensor:
    """The weight, fp32 ``[N, K]``, where no group size fits.

    Args:
        codes: uint8 ``[N * K]``.
        quant_map: float ``[16]``.
        absmax: float ``[blocks]``.
        state: of the weight.
    """
    count = codes.numel()
    scale = absmax.float().repeat_interleave(min(state.blocksize, count))[:count]
    return (quant_map.float()[codes.long()] * scale).view(state.shape)


def decode_int8(codes: Tensor, scb: Tensor) -> Tensor:
    """``W[n, k] = codes[n, k] * SCB[n] / 127``: int8 ``[N, K]``, float ``[N]`` -> fp32 ``[N, K]``.

    Multiplied in the order of the package, so that the last bit agrees.
    """
    return codes.float().mul_(scb.float()[:, None]).mul_(1 / 127)


def quant_type(codebook: Tensor) -> str:
    """ "nf4" or "fp4", of a codebook that holds one of them rounded to its dtype.

    The package computes with a table of its own, whatever a file says. Kernels round to the dtype
    of activations; a codebook of that dtype gives the same products as the table.

    Raises:
        ValueError: it is another one, or not one for the whole tensor.
    """
    if codebook.dim() == 1:
        for name, values in _CODEBOOKS.items():
            table = torch.tensor(values, device=codebook.device)
            if torch.equal(table.to(codebook.dtype), codebook):
                return name
    raise ValueError("bitsandbytes holds the codebooks of NF4 and FP4 only, one per weight")


def encode(
    codes: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a weight on disk, by name in the layer, without double quantisation.

    Args:
        codes: uint8 ``[N, K]`` in 0..15.
        codebook: float ``[16]``, see ``quant_type``.
        scales: float ``[N, K / group_size]``, which fp32 holds exactly.
        group_size: of K channels; groups in pairs of equal scales are joined, as the package knows
            blocks of 32 since recently.
        dtype: that the package is to decode to.

    Raises:
        ValueError: another codebook, no scales, or groups that are no blocks of the package.
    """
    n, k = codes.shape
    name = quant_type(codebook)
    if scales is None or group_size not in _BLOCK_SIZES or k % group_size:
        raise ValueError(
            f"bitsandbytes needs scales for groups of {', '.join(map(str, _BLOCK_SIZES))} that "
            f"divide K, got {'no scales' if scales is None else f'{group_size} for K = {k}'}"
        )
    absmax = scales.float().flatten()
    if group_size == 32 and torch.equal(absmax[::2][: len(absmax) // 2], absmax[1::2]):
        absmax, group_size = absmax[::2], 64
    pairs = codes.reshape(-1, 2)  # K is even, as group_size is
    state = {"quant_type": name, "blocksize": group_size, "shape": [n, k]}
    text = json.dumps(state | {"dtype": str(dtype).removeprefix("torch.")}).encode()
    return {
        "weight": (pairs[:, 0] << 4 | pairs[:, 1])[:, None],
        "weight.absmax": absmax.contiguous(),
        "weight.quant_map": torch.tensor(_CODEBOOKS[name]),
        f"weight.quant_state.bitsandbytes__{name}": torch.tensor(list(text), dtype=torch.uint8),
    }
