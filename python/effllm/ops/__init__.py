"""The ops of effllm as documented Python functions; each is also ``torch.ops.effllm.<name>``."""

from .add_rms_norm_fp8_quantize import add_rms_norm_fp8_quantize
from .add_rms_norm_int8_quantize import add_rms_norm_int8_quantize
from .attn_colsum import attn_colsum
from .block_copy import block_copy
from .dense_gemm import dense_gemm
from .fp8_gemm import fp8_gemm
from .fp8_quantize import fp8_quantize
from .fp8_quantize_tensor import fp8_quantize_tensor
from .fp8_weight_gemm import fp8_weight_gemm
from .h2o_append import h2o_append
from .h2o_attention import h2o_attention
from .int4_gemm import int4_gemm
from .int4_pack import int4_pack
from .int4_unpack import int4_unpack
from .int8_gemm import int8_gemm
from .int8_quantize import int8_quantize
from .int8_quantize_asymmetric import int8_quantize_asymmetric
from .int8_weight_gemm import int8_weight_gemm
from .kv_append import kv_append
from .kv_compact import kv_compact
from .lut4_gemm import lut4_gemm
from .merge_states import merge_states
from .paged_attention import paged_attention
from .rms_norm_fp8_quantize import rms_norm_fp8_quantize
from .rms_norm_int8_quantize import rms_norm_int8_quantize
from .rope_kv_append import rope_kv_append
from .silu_mul_fp8_quantize import silu_mul_fp8_quantize
from .silu_mul_int8_quantize import silu_mul_int8_quantize
from .tree_verify import tree_verify
from .w4a8_gemm import w4a8_gemm

__all__ = [
    "add_rms_norm_fp8_quantize",
    "add_rms_norm_int8_quantize",
    "attn_colsum",
    "block_copy",
    "dense_gemm",
    "fp8_gemm",
    "fp8_quantize",
    "fp8_quantize_tensor",
    "fp8_weight_gemm",
    "h2o_append",
    "h2o_attention",
    "int4_gemm",
    "int4_pack",
    "int4_unpack",
    "int8_gemm",
    "int8_quantize",
    "int8_quantize_asymmetric",
    "int8_weight_gemm",
    "kv_append",
    "kv_compact",
    "lut4_gemm",
    "merge_states",
    "paged_attention",
    "rms_norm_fp8_quantize",
    "rms_norm_int8_quantize",
    "rope_kv_append",
    "silu_mul_fp8_quantize",
    "silu_mul_int8_quantize",
    "tree_verify",
    "w4a8_gemm",
]
