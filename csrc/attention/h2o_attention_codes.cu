// h2o_attention of caches in 8 or 4 bits. Roofline: see the kernels.
#include "attention/h2o_attention_launch.cuh"

namespace effllm {

template void launch_h2o_attention<KvE4M3>(PagedAttentionArgs, const AttentionContext&);
template void launch_h2o_attention<KvInt8>(PagedAttentionArgs, const AttentionContext&);
template void launch_h2o_attention<KvInt4>(PagedAttentionArgs, const AttentionContext&);

}  // namespace effllm
