// Steps of some tokens, over caches in int8. Roofline: see the kernel.
#include "attention/paged_extend_launch.cuh"

namespace effllm {

template struct PagedExtend<float16, KvInt8>;
template struct PagedExtend<bfloat16, KvInt8>;

}  // namespace effllm
