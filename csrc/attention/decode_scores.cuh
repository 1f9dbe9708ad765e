// The scores of a (sequence, KV head) in h2o_attention, on their way from the loop of the decode
// kernel, where they come up, to the CTA that knows the lse of all rows and what they weigh.
//
// Roofline: bytes. For each key 4 for each row, written and soon read again, from L2 if not too
// many come between, which then lets go of them unwritten; and 8 of what is added to. K and V of 16
// bits are 4 * D. The CTA that merges has all keys of the pair to itself, and many on the way.
//
//   scratch [B * HKV, stride_logits keys, rows]   log2(e) * score, the rows rounded up to 4
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention/online_softmax.cuh"
#include "attention/paged_sequence.cuh"
#include "common/math.h"
#include "ptx/l2.cuh"
#include "ptx/load.cuh"

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

  static constexpr int rows_of_key(int group) { return (group + 3) / 4 * 4; }

 private:
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

// Adds to the sums of a pair what its keys weigh: by all threads of the CTA that has the lse of the
// rows, once all of its scores can be read. The first keys are on the way before the lse is there.
template <class Config>
class ScoreSums {
  // Keys of a thread that are on the way together, and whether the first ones are while parts are
  // merged: as registers allow.
  static constexpr int kBatch = Config::kWarpsPerSm <= 12 ? 16 : 8;
  static constexpr bool kAhead = Config::kWarpsPerSm <= 8;
  static constexpr int kStep = kBatch * Config::kThreads;

 public:
  __device__ __forceinline__ ScoreSums(const PagedAttentionArgs& args, const Sequence& sequence,
                                       int kv_head)
      : group_(args.group),
        num_keys_(static_cast<int>(min(int64_t{sequence.num_keys}, args.num_score_slots))),
        scores_gmem_(ScoreScratch(args, sequence, kv_head).of_pair()),
        sums_gmem_(args.scores + sequence.seq_idx * args.stride_scores_seq +
                   kv_head * args.stride_scores_head) {}

  // The sums of some keys into L2.
  __device__ __forceinline__ void prefetch(KeyRange keys) const {
    constexpr int kLine = 128 / sizeof(float);
    const int end = min(keys.end, num_keys_);
    for (int key = keys.begin + static_cast<int>(threadIdx.x) * kLine; key < end;
         key += Config::kThreads * kLine) {
      ptx::prefetch_l2(sums_gmem_ + key);
    }
  }

  __device__ __forceinline__ void start() {
    if constexpr (kAhead) with_rows([&](auto rows) { load<rows>(thread_key(0)); });
  }

  // `base`: of each row, what its weights are powers against.
  __device__ __forceinline__ void finish(const float* base) {
    with_rows([&](auto rows) { add<rows>(base); });
  }

 private:
  // The first key of this thread among those of a step.
  static __device__ __forceinline__ int thread_key(int step_begin) {
    return step_begin + static_cast<int>(threadIdx.x);
  }

  // Calls `body` with the rows of a key, a constant, so that all addresses are one and an offset.
  template <class Body>
  __device__ __forceinline__ void with_rows(Body body) const {
    if (group_ <= 4) {
      body(std::integral_constant<int, 4>{});
    } else {
      body(std::integral_constant<int, 8>{});
    }
  }

  __device__ __forceinline__ bool has_key(int first, int i) const {
    return first + i * Config::kThreads < num_keys_;
  }

  template <int kRows>
  __device__ __forceinline__ void add(const float* base) {
#pragma unroll 1
    for (int begin = 0; begin < num_keys_; begin += kStep) {
      const int first = thread_key(begin);
      if (!kAhead || begin > 0) load<kRows>(first);
      float weights[kBatch] = {};
      add_rows(weights, base, 0);
      if constexpr (kRows > 4) {
        load_rows<kRows>(first, 4);
        add_rows(weights, base, 4);
      }
      float* const sums = sums_gmem_ + first;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (has_key(first, i)) sums[i * Config::kThreads] = sums_[i] + weights[i];
      }
      discard<kRows>(first);
    }
  }

  // The scores of a step, of which a warp has 32 keys in a row at a time, need not go to memory.
  template <int kRows>
  __device__ __forceinline__ void discard(int first) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    constexpr int kLineKeys = 32 / kRows;
    __syncwarp();  // all have read
    for (int i = lane; i < kBatch * kRows; i += 32) {
      const int key = first - lane + i / kRows * Config::kThreads + i % kRows * kLineKeys;
      if (key < num_keys_) ptx::discard_l2(scores_gmem_ + static_cast<uint32_t>(key * kRows));
    }
  }

  template <int kRows>
  __device__ __forceinline__ void load(int first) {
    load_rows<kRows>(first, 0);
    const float* const sums = sums_gmem_ + first;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      sums_[i] = has_key(first, i) ? sums[i * Config::kThreads] : 0.f;
    }
  }

  // Past L1, as others wrote.
  template <int kRows>
  __device__ __forceinline__ void load_rows(int first, int row) {
    const auto* const scores =
        reinterpret_cast<const float4*>(scores_gmem_ + static_cast<uint32_t>(first * kRows + row));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (has_key(first, i)) {
        scores_[i] = __ldcg(scores + i * Config::kThreads * (kRows / 4));
      } else if constexpr (!kAhead) {
        scores_[i] = {};  // or those of the step before would be kept
      }
    }
  }

  // The rows from `row` on of those that were loaded.
  __device__ __forceinline__ void add_rows(float (&weights)[kBatch], const float* base,
                                           int row) const {
#pragma unroll
    for (int within = 0; within < 4; ++within) {
      if (row + within >= group_) break;
      const float base_of_row = base[row + within];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float score = within == 0   ? scores_[i].x
                            : within == 1 ? scores_[i].y
                            : within == 2 ? scores_[i].z
                                          : scores_[i].w;
        weights[i] += ptx::exp2_approx(score - base_of_row);
      }
    }
  }

  const int group_, num_keys_;
  const float* const scores_gmem_;
  float* const sums_gmem_;
  float4 scores_[kBatch];
  float sums_[kBatch];
};

}  // namespace effllm
