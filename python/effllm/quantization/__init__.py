"""Quantising whole models in place."""

from effllm.quantization.quantize import Int4Config, quantize_

__all__ = ["Int4Config", "quantize_"]
