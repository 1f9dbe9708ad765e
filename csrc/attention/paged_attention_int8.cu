// Attention to caches in int8. Roofline: see the kernels.
#include "attention/paged_attention_launch.cuh"

namespace effllm {

template void launch_paged_attention<KvInt8>(const PagedAttentionArgs&, const AttentionContext&);

}  // namespace effllm
