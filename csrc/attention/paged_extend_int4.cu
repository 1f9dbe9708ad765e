// Steps of some tokens, over caches in int4. Roofline: see the kernel.
#include "attention/paged_extend_launch.cuh"

namespace effllm {

template void launch_paged_extend<float16, KvInt4>(const PagedAttentionArgs&,
                                                   const AttentionContext&);
template void launch_paged_extend<bfloat16, KvInt4>(const PagedAttentionArgs&,
                                                    const AttentionContext&);

}  // namespace effllm
