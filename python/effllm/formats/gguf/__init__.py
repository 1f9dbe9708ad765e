"""GGUF files: their container, their blocks, and Llama models in them."""

from effllm.formats.gguf.blocks import dequantize, quantize
from effllm.formats.gguf.reader import GgufFile, TensorInfo
from effllm.formats.gguf.spec import GgufError, TensorType

__all__ = [
    "GgufError",
    "GgufFile",
    "TensorInfo",
    "TensorType",
    "dequantize",
    "quantize",
]
