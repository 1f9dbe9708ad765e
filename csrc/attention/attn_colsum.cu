// The CUDA op. What bounds its kernel, attn_colsum_sm80.cuh says.
#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

#include "attention/attn_colsum.h"
#include "attention/attn_colsum_sm80.cuh"
#include "attention/paged_attention_launch.cuh"
#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {

template void launch_attn_colsum<float16>(const char*, const AttnColsumArgs&, cudaStream_t);
template void launch_attn_colsum<bfloat16>(const char*, const AttnColsumArgs&, cudaStream_t);

namespace {

constexpr const char* kOp = "attn_colsum";

Tensor attn_colsum_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& page_table,
                        const Tensor& seq_lens, const Tensor& cu_seqlens_q, const Tensor& lse,
                        const std::optional<Tensor>& k_scale, const std::optional<Tensor>& sinks,
                        int64_t max_seqlen_k, std::optional<int64_t> last_n,
                        std::optional<double> scale, double softcap) {
  const View k_view = as_view(k_cache, "k_cache");
  const AttnColsumParams params = check_attn_colsum(
      as_view(q, "q"), k_view, as_view(page_table, "page_table"), as_view(seq_lens, "seq_lens"),
      as_view(cu_seqlens_q, "cu_seqlens_q"), as_view(lse, "lse"), as_view(k_scale, "k_scale"),
      as_view(sinks, "sinks"), max_seqlen_k, last_n, scale, softcap);
  check_cache_alignment(kOp, k_view);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());

  PagedAttentionArgs attention{params.attention};
  Tensor out =
      new_empty(q, {attention.num_seqs, attention.num_kv_heads, params.max_keys}, DType::kFloat32);
  if (out.numel() == 0) return out;
  if (attention.num_tokens == 0 || attention.num_q_heads == 0 || attention.num_pages == 0) {
    torch::stable::zero_(out);
    return out;
  }
  const Tensor aligned_q = with_aligned_rows(q, kRowAlignment);
  attention.set_q(as_view(aligned_q, "q"));
  prepare_args(attention);
  const AttnColsumArgs args{.attention = attention,
                            .stride_lse_token = params.stride_lse_token,
                            .out = static_cast<float*>(out.mutable_data_ptr()),
                            .stride_out_seq = out.stride(0),
                            .stride_out_head = out.stride(1),
                            .max_keys = static_cast<int32_t>(params.max_keys),
                            .last_n = static_cast<int32_t>(params.last_n),
                            .accumulates = false};
  const cudaStream_t stream = current_cuda_stream(q);
  dispatch_16bit(attention.dtype,
                 [&](auto element) { launch_attn_colsum<decltype(element)>(kOp, args, stream); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("attn_colsum", TORCH_BOX(&attn_colsum_cuda));
}

}  // namespace effllm
