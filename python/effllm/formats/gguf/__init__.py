"""GGUF files: their container, their blocks, and Llama models in them."""

from effllm.formats.gguf.blocks import dequantize, quantize
from effllm.formats.gguf.reader import GgufFile, TensorInfo
from effllm.formats.gguf.spec import GgufError, TensorType
from effllm.formats.gguf.writer import TensorSource, write_gguf

__all__ = [
    "GgufError",
    "GgufFile",
    "TensorInfo",
    "TensorSource",
    "TensorType",
    "dequantize",
    "quantize",
    "write_gguf",
]
