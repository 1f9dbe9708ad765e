// Steps of some tokens, over caches in int4. Roofline: see the kernel.
#include "attention/paged_extend_launch.cuh"

namespace effllm {

template struct PagedExtend<float16, KvInt4>;
template struct PagedExtend<bfloat16, KvInt4>;

}  // namespace effllm
