// Steps of some tokens, over caches in the dtype of q. Roofline: see the kernel.
#include "attention/paged_extend_launch.cuh"

namespace effllm {

template struct PagedExtend<float16, float16>;
template struct PagedExtend<bfloat16, bfloat16>;

}  // namespace effllm
