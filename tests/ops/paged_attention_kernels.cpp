// paged_attention's kernels that split keys, on warps whose lanes take turns;
// test_paged_attention_kernels.py compiles it, and calls it with tensors.
#include <cuda_runtime.h>

namespace effllm {
// The dynamic shared memory of a CTA: ahead of the kernels that declare it.
alignas(1024) thread_local uint4 smem_raw[16 * 1024];
}  // namespace effllm

#include "attention/paged_attention_launch.cuh"

#include <cstdint>
#include <vector>

#include "tensor_argument.h"

namespace effllm {

template struct PagedExtend<bfloat16, bfloat16>;
template struct PagedExtend<bfloat16, KvE4M3>;
template struct PagedExtend<bfloat16, KvInt8>;
template struct PagedExtend<bfloat16, KvInt4>;

}  // namespace effllm

// For q of bf16. Tensors in the order of the schema, then out and lse. `window`: 0 is none; `num_sms` and
// `capability`: of the GPU that is played.
extern "C" void paged_attention_on_warps(const TensorArgument* tensors, int64_t max_seqlen_q,
                                         double scale, bool causal, int64_t window, double softcap,
                                         int64_t split_size, int64_t sink_tokens, int num_sms,
                                         int capability) {
  using namespace effllm;
  const auto view = [&](int idx) { return tensors[idx].view(); };
  const auto given = [](int64_t value) {
    return value > 0 ? std::optional<int64_t>(value) : std::nullopt;
  };
  PagedAttentionArgs args{check_paged_attention(
      *view(0), *view(1), *view(2), *view(3), *view(4), *view(5), view(6), view(7), view(8),
      view(9), view(10), max_seqlen_q, scale, causal, given(window), softcap, given(split_size),
      sink_tokens)};
  args.out = tensors[11].data;
  args.lse = static_cast<float*>(tensors[12].data);
  fake_num_sms = num_sms, fake_capability = capability;
  prepare_args(args);
  std::vector<float> workspace;
  const AttentionContext context{0, nullptr, [&](int64_t floats) {
                                   workspace.assign(floats, NAN);
                                   return workspace.data();
                                 }};
  if (is_quantized_kv(args.kv_dtype)) {
    dispatch_kv_codec(args.kv_dtype, [&](auto codec) {
      launch_paged_attention<bfloat16, decltype(codec)>(args, context);
    });
  } else {
    launch_paged_attention<bfloat16, bfloat16>(args, context);
  }
}
