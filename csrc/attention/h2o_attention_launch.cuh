// Which kernels h2o_attention takes, for caches of one dtype: the decode kernel that adds to scores
// as it goes, or, for what that is not compiled for, attention and then the sums by key.
//
// Roofline: bytes, as in decoding; see the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention/attn_colsum_sm80.cuh"
#include "attention/decode_scores.cuh"
#include "attention/paged_attention_launch.cuh"
#include "common/dispatch.h"
#include "common/math.h"
#include "cuda/launch.h"

namespace effllm {

// Keys of a pair whose scores fit beside the rest that CTAs have in shared memory: all there may
// be, or as many as are added in whole steps.
template <class Config>
int32_t score_room(const PagedAttentionArgs& args, int smem_per_sm) {
  constexpr int kReserved = 2048;  // of each CTA: the driver's, and for alignment
  const int bytes = smem_per_sm / Config::kCtasPerSm - kReserved -
                    static_cast<int>(sizeof(PagedDecodeStorage<Config>));
  const int of_key = ScoreScratch::quads(args) * static_cast<int>(sizeof(float4));
  const int keys = std::max(bytes, 0) / of_key;
  if (keys >= args.stride_logits) return static_cast<int32_t>(args.stride_logits);
  return keys / ScoreSums<Config>::kStep * ScoreSums<Config>::kStep;
}

template <class Config>
void decode_with_scores(PagedAttentionArgs args, const AttentionContext& context) {
  static_assert(Config::kScores && Config::kRows == ScoreScratch::kMaxRows);
  args.stride_logits = ScoreScratch::room_for_keys(args);
  args.logits = context.allocate(ScoreScratch::floats(args));
  if constexpr (Config::kKeepsScores) {
    const int64_t num_ctas =
        int64_t{context.attribute(cudaDevAttrMultiProcessorCount)} * Config::kCtasPerSm;
    // Of fewer pairs none is one CTA's alone, but where lengths differ.
    if (args.num_seqs * args.num_kv_heads >= num_ctas) {
      const int smem = context.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
      args.score_room = score_room<Config>(args, smem);
    }
  }
  decode<Config>(args, context);
}

// False if no decode kernel is compiled for it: head dims that models with long texts seldom have,
// and more query heads of a KV head than a row tile takes.
template <class Element, class Kv>
bool launch_decode_with_scores(const PagedAttentionArgs& args, const AttentionContext& context) {
  if (!ScoreScratch::takes(args) || args.head_dim > 128) return false;
  if constexpr (std::is_same_v<Element, Kv>) {
    const int num_sms = context.attribute(cudaDevAttrMultiProcessorCount);
    if (args.head_dim <= 64) {
      decode_with_scores<PagedDecodeConfig<Element, 64, 8, Kv, false, true>>(args, context);
    } else if (args.num_seqs * args.num_kv_heads > num_sms) {
      decode_with_scores<PagedDecodeConfig<Element, 128, 4, Kv, false, true>>(args, context);
    } else {
      decode_with_scores<PagedDecodeConfig<Element, 128, 8, Kv, false, true>>(args, context);
    }
  } else {
    constexpr int kWarps = std::is_same_v<Kv, KvInt4> ? 4 : 8;
    using Config = PagedDecodeConfig<Element, 128, kWarps, Kv, false, true>;
    if (args.head_dim <= 64 || args.head_dim % DecodeKv<Config>::kKeyUnitDims != 0) return false;
    decode_with_scores<Config>(args, context);
  }
  return true;
}

struct CountUpParams {
  int32_t* out;
  int64_t count;
};

static __global__ void count_up_kernel(const __grid_constant__ CountUpParams params) {
  const int64_t idx = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (idx < params.count) params.out[idx] = static_cast<int32_t>(idx);
}

// 0, 1, 2 .. count - 1: the bounds of sequences of one query each.
inline const int32_t* count_up(int64_t count, const AttentionContext& context) {
  constexpr int kThreads = 256;
  auto* const out = reinterpret_cast<int32_t*>(context.allocate(count));
  const Launch launch{"h2o_attention",
                      dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kThreads))),
                      dim3(kThreads), 0, context.stream};
  launch(count_up_kernel, CountUpParams{out, count});
  return out;
}

// `Codec` is that of a quantised cache, or void: the cache has the dtype of q.
template <class Codec>
void launch_h2o_attention(PagedAttentionArgs args, const AttentionContext& context) {
  dispatch_16bit(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using Kv = std::conditional_t<std::is_void_v<Codec>, Element, Codec>;
    if (launch_decode_with_scores<Element, Kv>(args, context)) return;
    args.cu_seqlens_q = count_up(args.num_seqs + 1, context);
    launch_paged_attention<Codec>(args, context);
    if (args.num_score_slots == 0) return;
    launch_attn_colsum<Element>(
        "h2o_attention",
        {.attention = args,
         .stride_lse_token = args.num_q_heads,
         .out = args.scores,
         .stride_out_seq = args.stride_scores_seq,
         .stride_out_head = args.stride_scores_head,
         .max_keys = static_cast<int32_t>(std::min<int64_t>(args.num_score_slots, INT32_MAX)),
         .last_n = INT32_MAX,
         .accumulates = true},
        context.stream);
  });
}

// Compiled in h2o_attention_codes.cu.
extern template void launch_h2o_attention<KvE4M3>(PagedAttentionArgs, const AttentionContext&);
extern template void launch_h2o_attention<KvInt8>(PagedAttentionArgs, const AttentionContext&);
extern template void launch_h2o_attention<KvInt4>(PagedAttentionArgs, const AttentionContext&);

}  // namespace effllm
