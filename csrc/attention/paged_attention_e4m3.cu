// Attention to caches in e4m3. Roofline: see the kernels.
#include "attention/paged_attention_quantized.cuh"

namespace effllm {

EFFLLM_KV_LAUNCHES(, KvE4M3)

}  // namespace effllm
