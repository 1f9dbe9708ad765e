// paged_attention: softmax(scale * Q K^T) V over keys and values that live in pages.
//
//   q            [T, HQ, D]        query tokens of all sequences, one after the other
//   k_cache      [NP, P, HKV, D]   any strides with stride(-1) == 1 (usual memory: [NP, HKV, P, D])
//   v_cache      [NP, P, HKV, D]   likewise; both in the dtype of q, or in e4m3, int8 or int4
//   k_scale      [NP, P, HKV]      and v_scale: scales of quantised caches; quant/kv_layout.h
//   page_table   [B, MAXP] int32   page of each P keys; entries without a visible key are not read
//   seq_lens     [B] int32         keys of each sequence, those of its query tokens included
//                                  or, for every KV head, [B, HKV, MAXP] and [B, HKV]
//   cu_seqlens_q [B + 1] int32     sequence b owns query tokens cu_seqlens_q[b] .. [b + 1], from 0
//   sinks        [HQ] fp32         optional: a logit per query head that has no key and no value
//   alibi_slopes [HQ] fp32         optional: what a score loses for each position of distance
//   tree_mask    [T] int64         optional: of its sequence's query tokens, which each one sees
//   out          [T, HQ, D]        and lse [T, HQ] fp32, natural logarithm, of the keys alone
//
// Query i of the n of a sequence with s keys stands at position s - n + i (bottom-right alignment),
// where KV heads have lengths of their own in each head at its own.
// It sees key j if, when causal, j <= position, and, with a window w, j > position - w or j <
// sink_tokens.
// Scores are softcap * tanh(scale * qk / softcap) if softcap > 0, then less alibi_slopes[h] *
// |position - j|. A sink joins what weights are divided by: out * 1 / (1 + exp(sink - lse)). A row
// that sees no key is 0 with lse -inf; so is a query token of no sequence (cu_seqlens_q[B] < T),
// and a row whose scores are all -inf. Query head h reads KV head h / (HQ / HKV).
//
// With a tree_mask the query tokens of a sequence, at most 64, are the nodes of a tree: beside the
// s - n keys ahead of them query i sees those of them before it whose bits are set in its word, and
// itself. This, its path, is what positions count along: query and keys stand where they would if
// the path were all that follows those s - n keys. It takes the causal order; -1 is that alone.
//
// With a split_size, decoding cuts keys at its multiples, in all sequences alike, and merges what
// the pieces give in their order: the bits of a row depend on its sequence alone, not on the rest
// of the batch and not on how many multiprocessors there are. Prefill does not cut keys, and the
// CPU always at the same ones: neither needs it.
//
// Lengths and tables are data: the CPU raises on a value out of range, the GPU, which cannot raise,
// clamps it (seq_lens to MAXP * P, pages to NP - 1), so that nothing outside the tensors is read,
// and clears query tokens over max_seqlen_q.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "attention/tree_path.h"
#include "common/check.h"
#include "common/view.h"
#include "quant/kv_layout.h"

namespace effllm {

inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kSplitSizeStep = 64;  // what CTAs have at least

struct PagedAttentionParams {
  int64_t num_seqs, num_tokens, num_q_heads, num_kv_heads, head_dim;
  int64_t num_pages, page_size, max_pages_per_seq, max_seqlen_q;
  DType dtype;     // of q and out
  DType kv_dtype;  // of k_cache and v_cache

  const void* q;
  int64_t stride_q_token, stride_q_head;
  const void* k_cache;
  int64_t stride_k_page, stride_k_slot, stride_k_head;
  const void* v_cache;
  int64_t stride_v_page, stride_v_slot, stride_v_head;
  KvScales k_scales, v_scales;
  const int32_t* page_table;
  int64_t stride_page_table_seq, stride_page_table_head;
  const int32_t* seq_lens;
  int64_t stride_seq_lens_seq;  // from head to head it is 1
  int64_t table_heads;          // tables and lengths of a sequence: HKV, or 1 for all heads
  const int32_t* cu_seqlens_q;
  const float* sinks;         // [HQ], or null
  const float* alibi_slopes;  // likewise
  const int64_t* tree_mask;   // [T], or null

  float scale, softcap;
  bool causal;
  int64_t window;       // keys seen including the query's own; at most kNoWindow, which is all
  int64_t split_size;   // keys of a piece; 0: they are cut as suits the batch
  int32_t sink_tokens;  // keys of the head, the first, which stay visible; 0 without a window

  void* out;   // [T, HQ, D], contiguous
  float* lse;  // [T, HQ], contiguous
  // Scratch of ops that want scores, stride_logits of each row: on the CPU [T, HQ, stride_logits],
  // by position of the key; on a GPU see decode_scores.cuh. Else null.
  float* logits;
  int64_t stride_logits;

  static constexpr int64_t kNoWindow = INT64_MAX / 2;

  void set_q(const View& view) {
    q = view.data;
    stride_q_token = view.stride(0);
    stride_q_head = view.stride(1);
  }
};

// A number for each query head, or null.
inline const float* check_of_heads(Check& check, const std::optional<View>& view, Sym& q_heads) {
  if (!view) return nullptr;
  check(*view).dtype({DType::kFloat32}).shape({q_heads}).last_stride_one();
  return view->data_as<float>();
}

// The checks of what ops over a paged cache share; symbols and `check` are the op's. Without a
// window, a split_size, a tree, slopes and cu_seqlens_q.
inline PagedAttentionParams check_paged_operands(
    Check& check, const View& q, const View& k_cache, const View& v_cache, const View& page_table,
    const View& seq_lens, const std::optional<View>& k_scale, const std::optional<View>& v_scale,
    const std::optional<View>& sinks, std::optional<double> scale, double softcap, Sym& tokens,
    Sym& q_heads, Sym& kv_heads, Sym& seqs) {
  Sym dim("D"), pages("NP"), page_size("P"), max_pages("MAXP");
  check(q).shape({tokens, q_heads, dim}).last_stride_one();
  if (q.device.type == Device::Type::kCPU) {
    check(q).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  } else {
    check(q).dtype({DType::kFloat16, DType::kBFloat16});
  }
  check(k_cache).dtype({q.dtype, DType::kFloat8E4M3, DType::kInt8, DType::kUInt8});
  check(v_cache).dtype({k_cache.dtype});
  const KvScales k_scales =
      check_kv_cache(check, k_cache, k_scale, "k_scale", pages, page_size, kv_heads, dim);
  const KvScales v_scales =
      check_kv_cache(check, v_cache, v_scale, "v_scale", pages, page_size, kv_heads, dim);
  const bool per_head = page_table.rank == 3;
  check(page_table).dtype({DType::kInt32});
  check(seq_lens).dtype({DType::kInt32});
  if (per_head) {
    check(page_table).shape({seqs, kv_heads, max_pages}).last_stride_one();
    check(seq_lens).shape({seqs, kv_heads}).last_stride_one();
  } else {
    check(page_table).shape({seqs, max_pages}).last_stride_one();
    check(seq_lens).shape({seqs}).last_stride_one();
  }
  PagedAttentionParams params{};
  params.sinks = check_of_heads(check, sinks, q_heads);

  check.that(
      *dim % 8 == 0 && *dim >= 8 && *dim <= kMaxHeadDim,
      "q must have a head dim that is a multiple of 8 up to 256, got " + std::to_string(*dim));
  check.that(*kv_heads > 0 && *q_heads % *kv_heads == 0,
             "q must have a number of heads that is a multiple of the cache's " +
                 std::to_string(*kv_heads) + ", got " + std::to_string(*q_heads));
  check.that(
      *seqs <= INT32_MAX / (per_head ? *kv_heads : 1),
      "page_table must be of less than 2^31 tables, got " + std::to_string(*seqs) + " sequences");
  check.that(*page_size > 0, "k_cache must have a page size of at least 1, got 0");
  // As floats, which is what kernels compute with.
  check.that(softcap >= 0.0 && softcap <= FLT_MAX,
             "softcap must be finite and at least 0 (0 = none), got " + std::to_string(softcap));
  check.that(!scale || std::abs(*scale) <= FLT_MAX,
             "scale must be finite, got " + std::to_string(scale.value_or(0.0)));

  params.num_seqs = *seqs;
  params.num_tokens = *tokens;
  params.num_q_heads = *q_heads;
  params.num_kv_heads = *kv_heads;
  params.head_dim = *dim;
  params.num_pages = *pages;
  params.page_size = *page_size;
  params.max_pages_per_seq = *max_pages;
  params.dtype = q.dtype;
  params.kv_dtype = k_cache.dtype;
  params.set_q(q);
  params.k_cache = k_cache.data;
  params.stride_k_page = k_cache.stride(0);
  params.stride_k_slot = k_cache.stride(1);
  params.stride_k_head = k_cache.stride(2);
  params.v_cache = v_cache.data;
  params.stride_v_page = v_cache.stride(0);
  params.stride_v_slot = v_cache.stride(1);
  params.stride_v_head = v_cache.stride(2);
  params.k_scales = k_scales;
  params.v_scales = v_scales;
  params.page_table = page_table.data_as<int32_t>();
  params.stride_page_table_seq = page_table.stride(0);
  params.stride_page_table_head = per_head ? page_table.stride(1) : 0;
  params.stride_seq_lens_seq = seq_lens.stride(0);
  params.table_heads = per_head ? *kv_heads : 1;
  params.seq_lens = seq_lens.data_as<int32_t>();
  params.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(*dim))));
  params.softcap = static_cast<float>(softcap);
  params.causal = true;
  params.window = PagedAttentionParams::kNoWindow;
  return params;
}

// Everything but `out` and `lse`, which the op allocates afterwards.
inline PagedAttentionParams check_paged_attention(
    const View& q, const View& k_cache, const View& v_cache, const View& page_table,
    const View& seq_lens, const View& cu_seqlens_q, const std::optional<View>& k_scale,
    const std::optional<View>& v_scale, const std::optional<View>& sinks,
    const std::optional<View>& alibi_slopes, const std::optional<View>& tree_mask,
    int64_t max_seqlen_q, std::optional<double> scale, bool causal, std::optional<int64_t> window,
    double softcap, std::optional<int64_t> split_size, int64_t sink_tokens) {
  Check check("paged_attention");
  Sym tokens("T"), q_heads("HQ"), kv_heads("HKV"), seqs("B");
  PagedAttentionParams params =
      check_paged_operands(check, q, k_cache, v_cache, page_table, seq_lens, k_scale, v_scale,
                           sinks, scale, softcap, tokens, q_heads, kv_heads, seqs);
  check(cu_seqlens_q).dtype({DType::kInt32}).shape({{"B + 1", *seqs + 1}}).last_stride_one();
  params.alibi_slopes = check_of_heads(check, alibi_slopes, q_heads);
  if (tree_mask) {
    check(*tree_mask).dtype({DType::kInt64}).shape({tokens}).last_stride_one();
    check.that(causal, "causal must be true with a tree_mask, got false");
    check.that(max_seqlen_q <= kMaxTreeTokens,
               "max_seqlen_q must be at most 64, the bits of a word, with a tree_mask, got " +
                   std::to_string(max_seqlen_q));
    params.tree_mask = tree_mask->data_as<int64_t>();
  }
  check.that(max_seqlen_q >= 0,
             "max_seqlen_q must be at least 0, got " + std::to_string(max_seqlen_q));
  check.that(!window || *window >= 1,
             "window must be at least 1 or None, got " + std::to_string(window.value_or(0)));
  check.that(!split_size || (*split_size > 0 && *split_size % kSplitSizeStep == 0),
             "split_size must be a positive multiple of 64 or None, got " +
                 std::to_string(split_size.value_or(0)));
  check.that(sink_tokens >= 0,
             "sink_tokens must be at least 0, got " + std::to_string(sink_tokens));

  params.max_seqlen_q = max_seqlen_q;
  params.cu_seqlens_q = cu_seqlens_q.data_as<int32_t>();
  params.causal = causal;
  params.split_size = split_size.value_or(0);
  params.sink_tokens = window ? static_cast<int32_t>(std::min<int64_t>(sink_tokens, INT32_MAX)) : 0;
  params.window = std::min(window.value_or(INT64_MAX), PagedAttentionParams::kNoWindow);
  return params;
}

}  // namespace effllm
