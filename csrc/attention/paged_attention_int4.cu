// Attention to caches in int4. Roofline: see the kernels.
#include "attention/paged_attention_launch.cuh"

namespace effllm {

template void launch_paged_attention<KvInt4>(const PagedAttentionArgs&, const AttentionContext&);

}  // namespace effllm
