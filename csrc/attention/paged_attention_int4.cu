// Attention to caches in int4. Roofline: see the kernels.
#include "attention/paged_attention_quantized.cuh"

namespace effllm {

EFFLLM_KV_LAUNCHES(, KvInt4)

}  // namespace effllm
