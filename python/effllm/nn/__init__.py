"""Drop-in replacement layers: plain ``torch.nn`` modules whose forward calls one op of ours."""

from effllm.nn.linear import Int4Linear
from effllm.nn.lut4_linear import Lut4Linear

__all__ = ["Int4Linear", "Lut4Linear"]
