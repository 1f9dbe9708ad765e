"""int4_pack: 4-bit codes into the layout that every int4 kernel reads."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops

_op = ops.int4_pack.default


def int4_pack(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, one per byte, into tensor-core order.

    One row of the result per strip of 64 output rows, its columns in K order in units of 64, so
    that a slice at multiples of 64 along either dimension is itself a packed weight. Padding up to
    those multiples holds code 8, which decodes to zero with the symmetric zero point.

    Args:
        codes: uint8 [N, K], values 0..15, any strides.

    Returns:
        qweight, int32 [ceil(N/64), ceil(K/64) * 512], contiguous.

    Raises:
        RuntimeError: codes is not a uint8 matrix, or (on the CPU) holds a value over 15; a GPU,
            which cannot raise, keeps the low four bits.

    Source:
        The order within a strip is the A fragment of mma.m16n8k16 in the PTX ISA, drawn in
        csrc/quant/int4_layout.h.
    """
    return _op(codes)


@torch.library.register_fake(_op.name())
def _fake(codes: Tensor) -> Tensor:
    torch._check(codes.dim() == 2, lambda: f"int4_pack: codes must be [N, K], got {codes.shape}")
    n, k = codes.shape
    return codes.new_empty(((n + 63) // 64, (k + 63) // 64 * 512), dtype=torch.int32)


refuse_backward(_op)


def int4_pack_ref(codes: Tensor) -> Tensor:
    """Plain PyTorch: reshape to (strip, 16-row block, row half, row) x (tile, step, column half,
    column pair, odd) and gather the eight codes of each word."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % 64, 0, -n % 64), value=8).long()
    strips, tiles = padded.shape[0] // 64, padded.shape[1] // 64
    blocks = padded.view(strips, 4, 2, 8, tiles, 4, 2, 4, 2)
    # strip, tile, 16-row block, row, column pair, step | odd, column half, row half
    elements = blocks.permute(0, 4, 1, 3, 7, 5, 8, 6, 2).flatten(-3)
    # As a sum of int64 products: bit 31 must end up as the sign.
    words = (elements << (4 * torch.arange(8, device=codes.device))).sum(-1)
    return words.to(torch.int32).view(strips, tiles * 512)
