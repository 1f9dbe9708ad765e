// h2o_attention's kernels on warps whose lanes take turns; test_h2o_attention.py compiles it, and calls it with
// tensors.
#include <cuda_runtime.h>

namespace effllm {
// The dynamic shared memory of a CTA: ahead of the kernels that declare it.
alignas(1024) thread_local uint4 smem_raw[16 * 1024];
}  // namespace effllm

#include "attention/h2o_attention.h"

#include <cstdint>
#include <deque>
#include <vector>

#include "attention/h2o_attention_launch.cuh"
#include "tensor_argument.h"

namespace effllm {
// What other files compile.
template void launch_paged_attention<void>(const PagedAttentionArgs&, const AttentionContext&);
template struct PagedExtend<float16, float16>;
template struct PagedExtend<bfloat16, bfloat16>;
template void launch_attn_colsum<float16>(const char*, const AttnColsumArgs&, cudaStream_t);
template void launch_attn_colsum<bfloat16>(const char*, const AttnColsumArgs&, cudaStream_t);
}  // namespace effllm

// For q of bf16. Tensors in the order of the schema, then out and lse; `num_sms` and `capability`: of the GPU that is
// played. False if it is quantised and no decode kernel is compiled for it.
extern "C" bool h2o_attention_on_warps(const TensorArgument* tensors, double scale, double softcap, int num_sms,
                                       int capability) {
  using namespace effllm;
  const auto view = [&](int idx) { return tensors[idx].view(); };
  const H2oAttentionParams params = check_h2o_attention(*view(0), *view(1), *view(2), *view(3), *view(4), *view(5),
                                                        view(6), view(7), view(8), scale, softcap);
  PagedAttentionArgs args{params.attention};
  args.out = tensors[9].data;
  args.lse = static_cast<float*>(tensors[10].data);
  args.scores = params.scores;
  args.stride_scores_seq = params.stride_scores_seq;
  args.stride_scores_head = params.stride_scores_head;
  args.num_score_slots = params.num_score_slots;
  fake_num_sms = num_sms, fake_capability = capability;
  prepare_args(args);
  std::deque<std::vector<float4>> memory;
  const AttentionContext context{0, nullptr, [&](int64_t floats) {
                                   memory.emplace_back(floats / 4 + 1, float4{NAN, NAN, NAN, NAN});
                                   return &memory.back()[0].x;
                                 }};
  if (is_quantized_kv(args.kv_dtype)) {
    return dispatch_kv_codec(args.kv_dtype, [&](auto codec) {
      return launch_decode_with_scores<bfloat16, decltype(codec)>(args, context);
    });
  }
  launch_h2o_attention<void>(args, context);
  return true;
}
