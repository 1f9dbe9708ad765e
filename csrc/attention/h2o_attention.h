// h2o_attention: a step of decoding by paged_attention that also adds to each key of the cache what
// attention it got, the scores by which H2O evicts.
//
//   q            [B, HQ, D]        one query token for each sequence, behind all of its keys
//   k_cache, v_cache, page_table, seq_lens, k_scale, v_scale, sinks: as in paged_attention.h
//   scores       [B, HKV, S] fp32  by place in the sequence of each KV head; added to, in place
//   out          [B, HQ, D]        and lse [B, HQ] fp32: those of paged_attention, on the CPU to
//   the
//                                  bit
//
// scores[b, h, j] += the sum over the query heads of KV head h, in their order, of the weight that
// each gives to key j of that head: exp(score - lse), a sink's share taken off. No atomics, and
// nothing is added across sequences. A query that sees no key, or only scores of -inf, adds 0.
// Scores behind a sequence's last key keep their bits.
//
// Lengths are data: the CPU raises on one over S; the GPU, which cannot raise, scores the first S
// keys.
#pragma once

#include <cstdint>
#include <optional>

#include "attention/paged_attention.h"
#include "common/check.h"
#include "common/view.h"

namespace effllm {

struct H2oAttentionParams {
  PagedAttentionParams attention;
  float* scores;
  int64_t num_score_slots;  // S
  int64_t stride_scores_seq, stride_scores_head;
};

// Everything but the results, the scratch and cu_seqlens_q, which the op allocates afterwards.
inline H2oAttentionParams check_h2o_attention(const View& q, const View& k_cache,
                                              const View& v_cache, const View& scores,
                                              const View& page_table, const View& seq_lens,
                                              const std::optional<View>& k_scale,
                                              const std::optional<View>& v_scale,
                                              const std::optional<View>& sinks,
                                              std::optional<double> scale, double softcap) {
  Check check("h2o_attention");
  Sym seqs("B"), q_heads("HQ"), kv_heads("HKV"), slots("S");
  H2oAttentionParams params{};
  params.attention =
      check_paged_operands(check, q, k_cache, v_cache, page_table, seq_lens, k_scale, v_scale,
                           sinks, scale, softcap, seqs, q_heads, kv_heads, seqs);
  check(scores).dtype({DType::kFloat32}).shape({seqs, kv_heads, slots}).last_stride_one();
  params.attention.max_seqlen_q = 1;
  params.scores = scores.data_as<float>();
  params.num_score_slots = *slots;
  params.stride_scores_seq = scores.stride(0);
  params.stride_scores_head = scores.stride(1);
  return params;
}

}  // namespace effllm
