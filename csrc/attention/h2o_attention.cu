// The CUDA op. Which kernels take it says h2o_attention_launch.cuh; what bounds them, they say.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/h2o_attention.h"
#include "attention/h2o_attention_launch.cuh"
#include "common/torch.h"

namespace effllm {
namespace {

constexpr const char* kOp = "h2o_attention";

std::tuple<Tensor, Tensor> h2o_attention_cuda(const Tensor& q, const Tensor& k_cache,
                                              const Tensor& v_cache, const Tensor& scores,
                                              const Tensor& page_table, const Tensor& seq_lens,
                                              const std::optional<Tensor>& k_scale,
                                              const std::optional<Tensor>& v_scale,
                                              const std::optional<Tensor>& sinks,
                                              std::optional<double> scale, double softcap) {
  const View k_view = as_view(k_cache, "k_cache"), v_view = as_view(v_cache, "v_cache");
  const H2oAttentionParams params = check_h2o_attention(
      as_view(q, "q"), k_view, v_view, as_mutable_view(scores, "scores"),
      as_view(page_table, "page_table"), as_view(seq_lens, "seq_lens"), as_view(k_scale, "k_scale"),
      as_view(v_scale, "v_scale"), as_view(sinks, "sinks"), scale, softcap);
  check_cache_alignment(kOp, k_view);
  check_cache_alignment(kOp, v_view);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());

  PagedAttentionArgs attention{params.attention};
  Tensor out = new_empty(q, {attention.num_tokens, attention.num_q_heads, attention.head_dim},
                         attention.dtype);
  Tensor lse = new_empty(q, {attention.num_tokens, attention.num_q_heads}, DType::kFloat32);
  if (lse.numel() == 0) return {out, lse};
  if (attention.num_pages == 0) {  // no row sees a key
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }
  const Tensor aligned_q = with_aligned_rows(q, kRowAlignment);
  attention.set_q(as_view(aligned_q, "q"));
  attention.out = out.mutable_data_ptr();
  attention.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention.scores = params.scores;
  attention.stride_scores_seq = params.stride_scores_seq;
  attention.stride_scores_head = params.stride_scores_head;
  attention.num_score_slots = params.num_score_slots;
  prepare_args(attention);

  std::vector<Tensor> memory;
  const AttentionContext context{q.get_device_index(), current_cuda_stream(q), [&](int64_t floats) {
                                   memory.push_back(new_empty(q, {floats}, DType::kFloat32));
                                   return static_cast<float*>(memory.back().mutable_data_ptr());
                                 }};
  if (is_quantized_kv(attention.kv_dtype)) {
    dispatch_kv_codec(attention.kv_dtype, [&](auto codec) {
      launch_h2o_attention<decltype(codec)>(attention, context);
    });
  } else {
    launch_h2o_attention<void>(attention, context);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("h2o_attention", TORCH_BOX(&h2o_attention_cuda));
}

}  // namespace effllm
