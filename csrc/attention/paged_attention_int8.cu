// Attention to caches in int8. Roofline: see the kernels.
#include "attention/paged_attention_quantized.cuh"

namespace effllm {

EFFLLM_KV_LAUNCHES(, KvInt8)

}  // namespace effllm
