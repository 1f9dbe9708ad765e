"""The numbers of the GGUF specification, and the one error for files that break it.

Source: docs/gguf.md in ggml-org/ggml; sizes of the quantised blocks: the block structs of ggml.
"""

from __future__ import annotations

from enum import IntEnum

from effllm.formats.checkpoint import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_KEY_BYTES = 65535
MAX_DIMS = 4


class GgufError(CheckpointError):
    """A GGUF file, or what shall become one, breaks the specification or is not supported."""


class ValueType(IntEnum):
    """Types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


NUMBERS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
"""The code of each numeric value type, for struct and numpy alike."""


class TensorType(IntEnum):
    """Types of tensors. Values along the last dimension are stored in blocks.

    All types of the specification are here, so that any file can be listed; `blocks.DECODED` names
    those whose values can be had.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39

    @property
    def block_values(self) -> int:
        """Values per block; the last dimension of a tensor is a multiple of it."""
        return _BLOCKS[self.name][0]

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return _BLOCKS[self.name][1]


_BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 40),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
}


def quote(name: str) -> str:
    """A name from a file, fit for a message: no control characters, and not too long."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


def check_alignment(value: object) -> int:
    """The alignment of tensor data, in bytes.

    The specification asks for a multiple of 8, ggml for a power of two: files that both read have
    both. Nothing gains from more than a megabyte, which a writer would have to pad with.
    Raises GgufError for anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise GgufError(f"'{ALIGNMENT_KEY}' must be an integer, got {type(value).__name__}")
    if value & (value - 1) or not 8 <= value <= 1 << 20:
        raise GgufError(f"'{ALIGNMENT_KEY}' must be a power of two from 8 to 2**20, got {value}")
    return value
