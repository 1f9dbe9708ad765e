"""GGUF files: their container, their blocks, and the models and tokenizers in them."""

from effllm.formats.gguf.blocks import dequantize, quantize
from effllm.formats.gguf.config import config_metadata, read_config
from effllm.formats.gguf.reader import GgufFile, TensorInfo
from effllm.formats.gguf.spec import GgufError, TensorType
from effllm.formats.gguf.state import int4_layers, read_state_dict, write_model
from effllm.formats.gguf.tokenizer import read_tokenizer
from effllm.formats.gguf.tokenizer_metadata import tokenizer_metadata
from effllm.formats.gguf.writer import TensorSource, write_gguf

__all__ = [
    "GgufError",
    "GgufFile",
    "TensorInfo",
    "TensorSource",
    "TensorType",
    "config_metadata",
    "dequantize",
    "int4_layers",
    "quantize",
    "read_config",
    "read_state_dict",
    "read_tokenizer",
    "tokenizer_metadata",
    "write_gguf",
    "write_model",
]
