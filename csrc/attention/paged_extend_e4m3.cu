// Steps of some tokens, over caches in e4m3. Roofline: see the kernel.
#include "attention/paged_extend_launch.cuh"

namespace effllm {

template void launch_paged_extend<float16, KvE4M3>(const PagedAttentionArgs&,
                                                   const AttentionContext&);
template void launch_paged_extend<bfloat16, KvE4M3>(const PagedAttentionArgs&,
                                                    const AttentionContext&);

}  // namespace effllm
