// attn_colsum's kernel on warps whose lanes take turns; test_attn_colsum.py compiles it, and calls it with tensors.
#include <cuda_runtime.h>

namespace effllm {
// The dynamic shared memory of a CTA: ahead of the kernels that declare it.
alignas(1024) thread_local uint4 smem_raw[16 * 1024];
}  // namespace effllm

#include "attention/attn_colsum.h"

#include <cstdint>
#include <optional>

#include "attention/attn_colsum_sm80.cuh"
#include "attention/paged_attention_launch.cuh"
#include "tensor_argument.h"

namespace effllm {
template void launch_attn_colsum<bfloat16>(const char*, const AttnColsumArgs&, cudaStream_t);
}  // namespace effllm

// For q of bf16. Tensors in the order of the schema, then out; `last_n`: 0 is all.
extern "C" void attn_colsum_on_warps(const TensorArgument* tensors, int64_t max_seqlen_k,
                                     int64_t last_n, double scale, double softcap,
                                     bool accumulates) {
  using namespace effllm;
  const auto view = [&](int idx) { return tensors[idx].view(); };
  const AttnColsumParams params = check_attn_colsum(
      *view(0), *view(1), *view(2), *view(3), *view(4), *view(5), view(6), view(7), max_seqlen_k,
      last_n > 0 ? std::optional<int64_t>(last_n) : std::nullopt, scale, softcap);
  PagedAttentionArgs attention{params.attention};
  prepare_args(attention);
  const View out = *view(8);
  launch_attn_colsum<bfloat16>("attn_colsum",
                               {.attention = attention,
                                .stride_lse_token = params.stride_lse_token,
                                .out = out.data_as<float>(),
                                .stride_out_seq = out.stride(0),
                                .stride_out_head = out.stride(1),
                                .max_keys = static_cast<int32_t>(params.max_keys),
                                .last_n = static_cast<int32_t>(params.last_n),
                                .accumulates = accumulates},
                               nullptr);
}
