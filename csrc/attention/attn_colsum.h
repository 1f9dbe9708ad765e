// attn_colsum: how much attention keys get from the queries of prompts: column sums of the weights
// that paged_attention gives, which it does not keep.
//
//   q            [T, HQ, D]        query tokens of all sequences, as in paged_attention.h
//   k_cache, page_table, seq_lens, cu_seqlens_q, k_scale, sinks: likewise
//   lse          [T, HQ] fp32      what paged_attention returned for q
//   out          [B, HKV, S] fp32  by place in the sequence of each KV head; S = max_seqlen_k
//
// out[b, h, j] = the sum over queries i of sequence b and over the query heads of KV head h of
// exp(score(i, j) - lse(i)), a sink's share taken off: scores, order and lengths are those of
// paged_attention with causal order. With last_n only the last so many queries of each sequence
// count. Keys that no query sees, and places behind the last key, get 0. Sums are fp32, in a fixed
// order, without atomics.
//
// Lengths and tables are data: the CPU raises on a value out of range, the GPU, which cannot raise,
// clamps it as paged_attention does, and leaves out keys from S on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "attention/paged_attention.h"
#include "common/check.h"
#include "common/view.h"

namespace effllm {

struct AttnColsumParams {
  PagedAttentionParams attention;  // of it, v_cache is k_cache and lse is read
  int64_t stride_lse_token;
  int64_t max_keys;  // S
  int64_t last_n;
  float* out;  // [B, HKV, S], contiguous
};

// Everything but `out`, which the op allocates afterwards.
inline AttnColsumParams check_attn_colsum(const View& q, const View& k_cache,
                                          const View& page_table, const View& seq_lens,
                                          const View& cu_seqlens_q, const View& lse,
                                          const std::optional<View>& k_scale,
                                          const std::optional<View>& sinks, int64_t max_seqlen_k,
                                          std::optional<int64_t> last_n,
                                          std::optional<double> scale, double softcap) {
  Check check("attn_colsum");
  Sym tokens("T"), q_heads("HQ"), kv_heads("HKV"), seqs("B");
  AttnColsumParams params{};
  params.attention =
      check_paged_operands(check, q, k_cache, k_cache, page_table, seq_lens, k_scale, k_scale,
                           sinks, scale, softcap, tokens, q_heads, kv_heads, seqs);
  check(cu_seqlens_q).dtype({DType::kInt32}).shape({{"B + 1", *seqs + 1}}).last_stride_one();
  check(lse).dtype({DType::kFloat32}).shape({tokens, q_heads}).last_stride_one();
  check.that(max_seqlen_k >= 0 && max_seqlen_k <= INT32_MAX,
             "max_seqlen_k must be in [0, 2^31), got " + std::to_string(max_seqlen_k));
  check.that(!last_n || *last_n >= 1,
             "last_n must be at least 1 or None, got " + std::to_string(last_n.value_or(0)));
  params.attention.max_seqlen_q = *tokens;
  params.attention.cu_seqlens_q = cu_seqlens_q.data_as<int32_t>();
  params.attention.lse = lse.data_as<float>();
  params.stride_lse_token = lse.stride(0);
  params.max_keys = max_seqlen_k;
  params.last_n = std::min<int64_t>(last_n.value_or(INT32_MAX), INT32_MAX);
  return params;
}

}  // namespace effllm
