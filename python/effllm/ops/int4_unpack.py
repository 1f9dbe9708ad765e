"""int4_unpack: the inverse of int4_pack."""

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops

_op = ops.int4_unpack.default


def int4_unpack(qweight: Tensor, n: int, k: int) -> Tensor:
    """Unpack a packed int4 weight to one code per byte.

    Args:
        qweight: int32 [ceil(n/64), ceil(k/64) * 512] from `int4_pack`; its rows may be strided.
        n: rows of the codes; the packed padding beyond them is dropped.
        k: columns of the codes.

    Returns:
        codes, uint8 [n, k], values 0..15, contiguous.

    Raises:
        RuntimeError: qweight is not int32 or its shape does not follow from n and k.

    Source:
        The order within a strip is the A fragment of mma.m16n8k16 in the PTX ISA, drawn in
        csrc/quant/int4_layout.h.
    """
    return _op(qweight, n, k)


@torch.library.register_fake(_op.name())
def _fake(qweight: Tensor, n: int, k: int) -> Tensor:
    torch._check(
        qweight.dim() == 2, lambda: f"int4_unpack: qweight must be a matrix, got {qweight.shape}"
    )
    return qweight.new_empty((n, k), dtype=torch.uint8)


refuse_backward(_op)


def int4_unpack_ref(qweight: Tensor, n: int, k: int) -> Tensor:
    """Plain PyTorch: the word and bit of every code by the formula of the layout, which is the same
    in every strip of 64 rows."""
    rows = torch.arange(64, device=qweight.device).unsqueeze(1)
    cols = torch.arange(k, device=qweight.device).unsqueeze(0)
    thread = 32 * (rows // 16) + 4 * (rows % 8) + cols % 8 // 2
    word = cols // 64 * 512 + 4 * thread + cols % 64 // 16
    element = 4 * (cols % 16 // 8) + 2 * (rows % 16 // 8) + cols % 2
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=qweight.device)
    codes = (qweight[:, word] >> (4 * order[element]).int()) & 15
    return codes.to(torch.uint8).flatten(0, 1)[:n]
