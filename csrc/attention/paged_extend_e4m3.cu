// Steps of some tokens, over caches in e4m3. Roofline: see the kernel.
#include "attention/paged_extend_launch.cuh"

namespace effllm {

template struct PagedExtend<float16, KvE4M3>;
template struct PagedExtend<bfloat16, KvE4M3>;

}  // namespace effllm
