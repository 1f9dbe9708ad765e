// The scores of a (sequence, KV head) in h2o_attention, on their way from the loop of the decode
// kernel, where they come up, to the CTA that knows the lse of all rows and what they weigh.
//
// Roofline: bytes. For each key 4 for each row, written and soon read again, from L2 if not too
// many come between, and 8 of what is added to; K and V of 16 bits are 4 * D. The CTA that merges
// has all keys of the pair to itself, and many of them on the way.
//
//   scratch [B * HKV, stride_logits keys, rows]   log2(e) * score, the rows rounded up to 4
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "attention/online_softmax.cuh"
#include "attention/paged_sequence.cuh"
#include "common/math.h"

namespace effllm {

class ScoreScratch {
 public:
  static constexpr int kMaxRows = 8;  // query heads of a KV head, which one row tile takes

  // Whole tiles of the decode kernel have room.
  static int64_t room_for_keys(const PagedAttentionArgs& args) {
    const int64_t keys = std::min(args.num_score_slots, args.max_pages_per_seq * args.page_size);
    return round_up<int64_t>(keys, 64);
  }

  // Offsets within a pair are of 32 bits.
  static bool takes(const PagedAttentionArgs& args) {
    return args.group <= kMaxRows && room_for_keys(args) <= INT32_MAX / kMaxRows;
  }

  static int64_t floats(const PagedAttentionArgs& args) {
    return args.num_seqs * args.num_kv_heads * args.stride_logits * rows_of_key(args.group);
  }

  __device__ __forceinline__ ScoreScratch(const PagedAttentionArgs& args, const Sequence& sequence,
                                          int kv_head)
      : args_(args), sequence_(sequence), kv_head_(kv_head) {}

  __device__ __forceinline__ float* of_pair() const {
    const int64_t pair = sequence_.seq_idx * args_.num_kv_heads + kv_head_;
    return args_.logits + pair * args_.stride_logits * rows_of_key(args_.group);
  }

  // By all threads of a CTA, once all of it can be read, and the lse of the rows.
  template <int kThreads>
  __device__ __forceinline__ void add_weights() const {
    constexpr int kBatch = 4;  // keys of a thread that are on the way together
    const int num_keys = static_cast<int>(min(int64_t{sequence_.num_keys}, args_.num_score_slots));
    const float* const of_pair = this->of_pair();
    float* const sums = args_.scores + sequence_.seq_idx * args_.stride_scores_seq +
                        kv_head_ * args_.stride_scores_head;
    for (int first = threadIdx.x; first < num_keys; first += kBatch * kThreads) {
      // The last key in place of those behind it, so that a loop of loads has no branches.
      const auto key_at = [&](int i) { return min(first + i * kThreads, num_keys - 1); };
      float weights[kBatch] = {};
#pragma unroll 1
      for (int row = 0; row < args_.group; row += 4) {
        float4 scores[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const auto offset = static_cast<uint32_t>(key_at(i) * rows_of_key(args_.group) + row);
          // Past L1, as others wrote.
          scores[i] = __ldcg(reinterpret_cast<const float4*>(of_pair + offset));
        }
#pragma unroll
        for (int within = 0; within < 4; ++within) {
          if (row + within >= args_.group) break;
          const float base = base_of(row + within);
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const float score = within == 0   ? scores[i].x
                                : within == 1 ? scores[i].y
                                : within == 2 ? scores[i].z
                                              : scores[i].w;
            weights[i] += ptx::exp2_approx(score - base);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int key = first + i * kThreads;
        if (key < num_keys) sums[key] += weights[i];
      }
    }
  }

  static constexpr int rows_of_key(int group) { return (group + 3) / 4 * 4; }

 private:
  __device__ __forceinline__ float base_of(int row) const {
    const OutputRow out_row(args_, sequence_, kv_head_, row);
    return weight_base(args_.lse[out_row.idx], sink_score(args_, out_row.head));
  }

  const PagedAttentionArgs& args_;
  const Sequence& sequence_;
  const int kv_head_;
};

// A lane's part of a tile into the scratch of its pair: of keys `key` and its neighbour, and of
// those 16 further on, two neighbouring rows each. Masked or not; what lies past the last row or
// the last key is not wanted.
template <int kGroups>
__device__ __forceinline__ void store_scores(const PagedAttentionArgs& args, float* of_pair,
                                             const float (&scores)[kGroups][4], int key, int row) {
  if (row >= args.group || key >= static_cast<int>(args.stride_logits)) return;
  const int rows = ScoreScratch::rows_of_key(args.group);
  float* const of_key = of_pair + static_cast<uint32_t>(key * rows + row);
#pragma unroll
  for (int i = 0; i < kGroups * 2; ++i) {
    *reinterpret_cast<float2*>(of_key + (i / 2 * 16 + i % 2) * rows) =
        make_float2(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
  }
}

}  // namespace effllm
