// h2o_attention: schema and CPU implementation.
//
// The loop of paged_attention leaves its scores in memory, 4 bytes for every key and query head. As
// soon as all of a row's are there, and with them its lse, they become weights.
#include "attention/h2o_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention/paged_attention_cpu.h"
#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

void check_lengths(const H2oAttentionParams& params) {
  const PagedAttentionParams& attention = params.attention;
  for (int64_t seq = 0; seq < attention.num_seqs; ++seq) {
    for (int64_t head = 0; head < attention.table_heads; ++head) {
      const int64_t keys = sequence_at(attention, seq, head).num_keys;
      if (keys <= params.num_score_slots) continue;
      const std::string position =
          std::to_string(seq) + (attention.table_heads > 1 ? ", " + std::to_string(head) : "");
      fail("h2o_attention", "scores must have a slot for each key of seq_lens[" + position +
                                "] = " + std::to_string(keys) +
                                ", got S = " + std::to_string(params.num_score_slots));
    }
  }
}

// A thread for each piece of the keys of a KV head.
void add_scores(const H2oAttentionParams& params) {
  constexpr int64_t kPieceKeys = 16 * kTileKeys;
  const PagedAttentionParams& attention = params.attention;
  const int64_t group = attention.num_q_heads / attention.num_kv_heads;
  const int64_t pieces = ceil_div(attention.stride_logits, kPieceKeys);
  const int64_t pairs = attention.num_seqs * attention.num_kv_heads;
  const auto add_weights = select_attention_kernels(attention).add_weights;

  std::vector<float> bases(attention.num_seqs * attention.num_q_heads);
  for (size_t row = 0; row < bases.size(); ++row) {
    bases[row] = weight_base(attention, row % attention.num_q_heads, attention.lse[row]);
  }
  parallel_for(0, pairs * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t idx = begin; idx < end; ++idx) {
      const int64_t pair = idx / pieces, first_key = idx % pieces * kPieceKeys;
      const int64_t seq = pair / attention.num_kv_heads, head = pair % attention.num_kv_heads;
      const int64_t num_keys =
          std::min(sequence_at(attention, seq, head).num_keys, first_key + kPieceKeys);
      float* const scores =
          params.scores + seq * params.stride_scores_seq + head * params.stride_scores_head;
      for (int64_t key = first_key; key < num_keys; key += kTileKeys) {
        float sums[kTileKeys] = {};
        const int64_t row = seq * attention.num_q_heads + head * group;
        add_weights(attention.logits + row * attention.stride_logits + key, attention.stride_logits,
                    bases.data() + row, group, sums);
        const int64_t count = std::min(num_keys - key, kTileKeys);
        for (int64_t i = 0; i < count; ++i) scores[key + i] += sums[i];
      }
    }
  });
}

std::tuple<Tensor, Tensor> h2o_attention_cpu(const Tensor& q, const Tensor& k_cache,
                                             const Tensor& v_cache, const Tensor& scores,
                                             const Tensor& page_table, const Tensor& seq_lens,
                                             const std::optional<Tensor>& k_scale,
                                             const std::optional<Tensor>& v_scale,
                                             const std::optional<Tensor>& sinks,
                                             std::optional<double> scale, double softcap) {
  H2oAttentionParams params =
      check_h2o_attention(as_view(q, "q"), as_view(k_cache, "k_cache"), as_view(v_cache, "v_cache"),
                          as_mutable_view(scores, "scores"), as_view(page_table, "page_table"),
                          as_view(seq_lens, "seq_lens"), as_view(k_scale, "k_scale"),
                          as_view(v_scale, "v_scale"), as_view(sinks, "sinks"), scale, softcap);
  PagedAttentionParams& attention = params.attention;
  std::vector<int32_t> starts(attention.num_seqs + 1);
  std::iota(starts.begin(), starts.end(), 0);
  attention.cu_seqlens_q = starts.data();
  check_values("h2o_attention", attention);
  check_lengths(params);

  Tensor out = new_empty(q, {attention.num_tokens, attention.num_q_heads, attention.head_dim},
                         attention.dtype);
  Tensor lse = new_empty(q, {attention.num_tokens, attention.num_q_heads}, DType::kFloat32);
  attention.out = out.mutable_data_ptr();
  attention.lse = static_cast<float*>(lse.mutable_data_ptr());
  int64_t longest = 0;
  for (int64_t seq = 0; seq < attention.num_seqs; ++seq) {
    for (int64_t head = 0; head < attention.table_heads; ++head) {
      longest = std::max(longest, sequence_at(attention, seq, head).num_keys);
    }
  }
  attention.stride_logits = round_up(longest, kTileKeys);
  const auto logits = std::make_unique_for_overwrite<float[]>(
      attention.num_tokens * attention.num_q_heads * attention.stride_logits);
  attention.logits = logits.get();
  run_paged_attention(attention);
  add_scores(params);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "h2o_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) scores, "
      "Tensor page_table, Tensor seq_lens, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor? sinks=None, *, float? scale=None, float softcap=0.) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("h2o_attention", TORCH_BOX(&h2o_attention_cpu));
}

}  // namespace effllm
