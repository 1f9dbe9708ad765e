"""effllm: quantised kernels, paged caches and drop-in layers that make language models cheaper.

Ops are ``torch.ops.effllm.*``, documented in ``effllm.ops``; modules that call them in
``effllm.nn``; the paged cache in ``effllm.cache``; quantised checkpoints in ``effllm.formats``;
drafts for speculative decoding in ``effllm.speculative``.
With transformers, imported before or after, ``attn_implementation="effllm"`` is available, and
``from_pretrained`` reads quantised checkpoints; see ``effllm.integrations.use_quantizer``.
"""

from effllm import _load, cache, formats, nn, ops, speculative
from effllm.formats import load, save
from effllm.generation import Generation, generate
from effllm.integrations import register_on_import
from effllm.quantization import (
    AwqConfig,
    Fp8Config,
    GgufConfig,
    GptqConfig,
    Granularity,
    Int4Config,
    Int8Config,
    KMeansConfig,
    LinearConfig,
    SmoothQuantConfig,
    quantize_,
)

__all__ = [
    "AwqConfig",
    "Fp8Config",
    "Generation",
    "GgufConfig",
    "GptqConfig",
    "Granularity",
    "Int4Config",
    "Int8Config",
    "KMeansConfig",
    "LinearConfig",
    "SmoothQuantConfig",
    "cache",
    "formats",
    "generate",
    "load",
    "nn",
    "ops",
    "quantize_",
    "save",
    "speculative",
]

__version__ = _load.status().version

register_on_import()
