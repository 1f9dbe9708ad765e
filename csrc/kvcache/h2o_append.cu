// Roofline: bytes, 8 for every slot of a full head, read once; of few sequences, latency: one
// launch, lengths, slots, page, row.
#include <algorithm>
#include <optional>

#include "common/torch.h"
#include "kvcache/h2o_append.cuh"

namespace effllm {
namespace {

void h2o_append_cuda(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& scores, const Tensor& slot_pos, const Tensor& seq_lens,
                     const Tensor& page_table, const Tensor& positions,
                     const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                     std::optional<int64_t> budget, int64_t recent, int64_t n_sink,
                     bool normalize) {
  const H2oAppendParams params =
      check_h2o_append(as_view(k, "k"), as_view(v, "v"), as_mutable_view(k_cache, "k_cache"),
                       as_mutable_view(v_cache, "v_cache"), as_mutable_view(scores, "scores"),
                       as_mutable_view(slot_pos, "slot_pos"), as_mutable_view(seq_lens, "seq_lens"),
                       as_view(page_table, "page_table"), as_view(positions, "positions"),
                       as_mutable_view(k_scale, "k_scale"), as_mutable_view(v_scale, "v_scale"),
                       budget, recent, n_sink, normalize);
  if (params.append.num_tokens == 0 || params.append.num_kv_heads == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  launch_h2o_append(params, k.get_device_index(), current_cuda_stream(k));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("h2o_append", TORCH_BOX(&h2o_append_cuda)); }

}  // namespace effllm
