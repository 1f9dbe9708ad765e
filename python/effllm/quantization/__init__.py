"""Quantising whole models in place: methods, granularities, and the codebook of NF4."""

from effllm.quantization.codebook import NF4
from effllm.quantization.configs import (
    AwqConfig,
    GgufConfig,
    GptqConfig,
    Int4Config,
    KMeansConfig,
    LinearConfig,
)
from effllm.quantization.decoding import dequantize_
from effllm.quantization.fp8 import Fp8Config
from effllm.quantization.granularity import Granularity
from effllm.quantization.int8 import Int8Config, SmoothQuantConfig
from effllm.quantization.method import Method
from effllm.quantization.quantize import quantize_
from effllm.quantization.report import LayerResult, QuantizationReport
from effllm.quantization.sensitivity import choose_configs
from effllm.quantization.smoothing import smooth_

__all__ = [
    "NF4",
    "AwqConfig",
    "Fp8Config",
    "GgufConfig",
    "GptqConfig",
    "Granularity",
    "Int4Config",
    "Int8Config",
    "KMeansConfig",
    "LayerResult",
    "LinearConfig",
    "Method",
    "QuantizationReport",
    "SmoothQuantConfig",
    "choose_configs",
    "dequantize_",
    "quantize_",
    "smooth_",
]
