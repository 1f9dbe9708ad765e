// Steps of some tokens, over caches in the dtype of q. Roofline: see the kernel.
#include "attention/paged_extend_launch.cuh"

namespace effllm {

template void launch_paged_extend<float16, float16>(const PagedAttentionArgs&,
                                                    const AttentionContext&);
template void launch_paged_extend<bfloat16, bfloat16>(const PagedAttentionArgs&,
                                                      const AttentionContext&);

}  // namespace effllm
