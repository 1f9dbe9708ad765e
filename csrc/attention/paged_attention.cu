// The CUDA op. Which kernel takes it says paged_attention_launch.cuh; what bounds them, they say.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "attention/paged_attention.h"
#include "attention/paged_attention_launch.cuh"
#include "attention/paged_kv.h"
#include "common/torch.h"

namespace effllm {

template void launch_paged_attention<void>(const PagedAttentionArgs&, const AttentionContext&);

namespace {

constexpr const char* kOp = "paged_attention";
std::tuple<Tensor, Tensor> paged_attention_cuda(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
    const Tensor& seq_lens, const Tensor& cu_seqlens_q, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& tree_mask,
    int64_t max_seqlen_q, std::optional<double> scale, bool causal, std::optional<int64_t> window,
    double softcap, std::optional<int64_t> split_size, int64_t sink_tokens) {
  const View k_view = as_view(k_cache, "k_cache"), v_view = as_view(v_cache, "v_cache");
  PagedAttentionArgs args{check_paged_attention(
      as_view(q, "q"), k_view, v_view, as_view(page_table, "page_table"),
      as_view(seq_lens, "seq_lens"), as_view(cu_seqlens_q, "cu_seqlens_q"),
      as_view(k_scale, "k_scale"), as_view(v_scale, "v_scale"), as_view(sinks, "sinks"),
      as_view(alibi_slopes, "alibi_slopes"), as_view(tree_mask, "tree_mask"), max_seqlen_q, scale,
      causal, window, softcap, split_size, sink_tokens)};
  // A copy of the cache would cost more than the op: its layout is the caller's to mend.
  check_cache_alignment(kOp, k_view);
  check_cache_alignment(kOp, v_view);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());

  Tensor out = new_empty(q, {args.num_tokens, args.num_q_heads, args.head_dim}, args.dtype);
  Tensor lse = new_empty(q, {args.num_tokens, args.num_q_heads}, DType::kFloat32);
  if (lse.numel() == 0) return {out, lse};
  if (args.num_seqs == 0 || args.max_seqlen_q == 0 || args.num_pages == 0) {  // no row sees a key
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }

  const Tensor aligned_q = with_aligned_rows(q, kRowAlignment);
  args.set_q(as_view(aligned_q, "q"));
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  prepare_args(args);

  Tensor workspace;
  const AttentionContext context{q.get_device_index(), current_cuda_stream(q), [&](int64_t floats) {
                                   workspace = new_empty(q, {floats}, DType::kFloat32);
                                   return static_cast<float*>(workspace.mutable_data_ptr());
                                 }};
  if (is_quantized_kv(args.kv_dtype)) {
    dispatch_kv_codec(args.kv_dtype,
                      [&](auto codec) { launch_paged_attention<decltype(codec)>(args, context); });
  } else {
    launch_paged_attention<void>(args, context);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cuda));
}

}  // namespace effllm
