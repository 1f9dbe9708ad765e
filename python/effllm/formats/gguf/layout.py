"""Bytes of blocks, and the codes and headers that ``GgufLinear`` is made of.

Every function takes and gives ``[blocks, ...]`` uint8. Headers are what a block has beside codes.

Source: the block structs of ggml (ggml-common.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.formats.gguf.spec import TensorType
from effllm.nn.gguf_linear import BlockType

BLOCK_TYPES: dict[TensorType, BlockType] = {
    TensorType.Q8_0: "q8_0",
    TensorType.Q4_K: "q4_k",
    TensorType.Q6_K: "q6_k",
}
"""The types of ``GgufLinear``, by their number in files."""


def split(blocks: Tensor, tensor_type: BlockType) -> tuple[Tensor, Tensor]:
    """Codes ``[blocks, values]``, of Q8_0 plus 128, and headers.

    Q8_0, 34 bytes, 32 values ``code * d``:

        0    2                 34
        | d  | 32 signed codes |

    Q4_K, 144 bytes, 8 sub-blocks of 32 values ``code * scale_j - minimum_j``:

        0                  16                            144
        | see k_scales     | codes, see nibble_runs      |

    Q6_K, 210 bytes, 256 values ``(code - 32) * scale * d`` with a signed scale for each 16 of them:

        0                  128            192         208  210
        | low 4 bits       | high 2 bits  | 16 scales | d  |

    Each half of 128 values has 64 bytes of low bits: values 0..63 in the low nibbles, 64..127 in
    the high ones; and 32 bytes of high bits: bits 2i and 2i + 1 are those of values 32i..32i + 31.
    """
    if tensor_type == "q8_0":
        return blocks[:, 2:34] ^ 128, blocks[:, 0:2]
    if tensor_type == "q4_k":
        return nibble_runs(blocks[:, 16:144]).flatten(1), blocks[:, 0:16]
    low = nibbles(blocks[:, 0:128].unflatten(-1, (2, 64)))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).unsqueeze(-1)
    high = (blocks[:, 128:192].unflatten(-1, (2, 1, 32)) >> shifts) & 3
    return low.flatten(1) | (high.flatten(1) << 4), blocks[:, 192:210]


def join(codes: Tensor, headers: Tensor, tensor_type: BlockType) -> Tensor:
    """The blocks of codes and headers: the inverse of ``split``."""
    if tensor_type == "q8_0":
        return torch.cat([headers, codes ^ 128], 1)
    if tensor_type == "q4_k":
        low, high = codes.unflatten(-1, (4, 2, 32)).unbind(2)
        return torch.cat([headers, (low | (high << 4)).flatten(1)], 1)
    low, high = (codes & 15).unflatten(-1, (2, 2, 64)).unbind(2)
    tops = (codes >> 4).unflatten(-1, (2, 4, 32)).unbind(2)
    bits = tops[0] | (tops[1] << 2) | (tops[2] << 4) | (tops[3] << 6)
    return torch.cat([(low | (high << 4)).flatten(1), bits.flatten(1), headers], 1)


def nibbles(packed: Tensor) -> Tensor:
    """``[..., n]`` bytes -> ``[..., 2n]`` codes: all low nibbles, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def nibble_runs(packed: Tensor) -> Tensor:
    """128 bytes -> ``[blocks, 8, 32]``: each run of 32 bytes has the low nibbles of one sub-block
    and the high nibbles of the next."""
    return nibbles(packed.unflatten(-1, (4, 32))).view(-1, 8, 32)
