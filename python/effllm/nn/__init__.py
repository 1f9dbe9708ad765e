"""Drop-in replacement layers: plain ``torch.nn`` modules whose forward calls ops of ours."""

from effllm.nn.fp8_linear import Fp8Linear
from effllm.nn.gguf_linear import GgufLinear
from effllm.nn.int8_linear import Int8Linear
from effllm.nn.linear import Int4Linear
from effllm.nn.lut4_linear import Lut4Linear
from effllm.nn.paged_attention import PagedAttention
from effllm.nn.w4a8_linear import W4A8Linear
from effllm.nn.w8a8_linear import W8A8Linear

__all__ = [
    "Fp8Linear",
    "GgufLinear",
    "Int4Linear",
    "Int8Linear",
    "Lut4Linear",
    "PagedAttention",
    "W4A8Linear",
    "W8A8Linear",
]
