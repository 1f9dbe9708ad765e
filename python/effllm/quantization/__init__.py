"""Quantising whole models in place, and the codebook of NF4."""

from effllm.quantization.codebook import NF4
from effllm.quantization.quantize import Int4Config, quantize_

__all__ = ["NF4", "Int4Config", "quantize_"]
