// Attention to caches in e4m3. Roofline: see the kernels.
#include "attention/paged_attention_launch.cuh"

namespace effllm {

template void launch_paged_attention<KvE4M3>(const PagedAttentionArgs&, const AttentionContext&);

}  // namespace effllm
