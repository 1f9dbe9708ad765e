// The scores of a (sequence, KV head) in h2o_attention, on their way from the loop of the decode
// kernel, where they come up, to CTAs that know the lse of all rows and what they weigh.
//
// Roofline: bytes. For each key 8 of what is added to; and 4 for each row, written and soon read
// again. K and V are 4 * D, in int4 D + 8. Where CTAs have more keys between them than L2 has room
// for, rows go to memory and come back: 4 of them cost 32 bytes more beside the 264 of e4m3 at
// D = 128, and make it 1.15 of plain decode. Of few keys it is latency that counts, behind the
// merge of the parts; so many CTAs share it.
//
//   arrival of a pair's parts     0 .. P-K-2    P-K-1 .. P-2               P-1, the last
//                                 leaves        K helpers wait for it      merges the outputs
//                                               scores of a slice of keys
//                                                 -> weights -> sums       slices that were left
//
//   scratch [B * HKV, quads of rows, stride_logits keys, 4]   log2(e) * score
//           [B * HKV]                                         a word each, see ScoreHelpers
//
// A pair that one CTA has all of keeps the scores in shared memory where that costs no loads.
// Each sum has one CTA and thread that loads it, adds the rows in their order and stores it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "attention/combine.cuh"
#include "attention/online_softmax.cuh"
#include "attention/paged_sequence.cuh"
#include "common/math.h"
#include "ptx/atomic.cuh"
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

  // With a word for each pair behind them.
  static int64_t floats(const PagedAttentionArgs& args) {
    const int64_t pairs = args.num_seqs * args.num_kv_heads;
    return pairs * (args.stride_logits * kQuad * quads(args) + 2);
  }

  __device__ __forceinline__ ScoreScratch(const PagedAttentionArgs& args, const Sequence& sequence,
                                          int kv_head)
      : args_(args), pair_(sequence.seq_idx * args.num_kv_heads + kv_head) {}

  __device__ __forceinline__ float* of_pair() const {
    return args_.logits + pair_ * args_.stride_logits * kQuad * quads(args_);
  }

  __device__ __forceinline__ uint64_t* word_of_pair() const {
    const int64_t pairs = args_.num_seqs * args_.num_kv_heads;
    return reinterpret_cast<uint64_t*>(args_.logits +
                                       pairs * args_.stride_logits * kQuad * quads(args_)) +
           pair_;
  }

  static constexpr int kQuad = 4;
  static constexpr int quads(const PagedAttentionArgs& args) {
    return (args.group + kQuad - 1) / kQuad;
  }

 private:
  const PagedAttentionArgs& args_;
  const int64_t pair_;
};

// Where the scores of a part are: those of its first keys in shared memory, if it is all of a pair.
struct ScorePlaces {
  float *near, *far;  // where those of key 0 would be
  int near_end;       // the first key that is far

  // Four rows of a key.
  template <class Config>
  __device__ __forceinline__ float* of(const PagedAttentionArgs& args, int key, int quad) const {
    const bool is_near = Config::kKeepsScores && key < near_end;
    const int of_quad = is_near ? args.score_room : static_cast<int>(args.stride_logits);
    return (is_near ? near : far) + static_cast<uint32_t>((quad * of_quad + key) * 4);
  }
};

// A lane's part of a tile: of keys `key` and its neighbour, and of those 16 further on, two
// neighbouring rows each. Masked or not; what lies past the last row or the last key is not wanted.
template <class Config, int kGroups>
__device__ __forceinline__ void store_scores(const PagedAttentionArgs& args,
                                             const ScorePlaces& places,
                                             const float (&scores)[kGroups][4], int key, int row) {
  if (row >= args.group || key >= static_cast<int>(args.stride_logits)) return;
  float* const of_key = places.of<Config>(args, key, row / 4) + row % 4;
#pragma unroll
  for (int i = 0; i < kGroups * 2; ++i) {
    *reinterpret_cast<float2*>(of_key + (i / 2 * 16 + i % 2) * 4) =
        make_float2(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
  }
}

// CTAs that come shortly before the last one of a pair wait for it, and then add a slice of the
// sums each, while the last one merges the outputs. Nobody waits for ever: CTAs that wait may keep
// those that they wait for from running, as where the GPU has other work. So they look a number of
// times, then say by a bit that they leave their slice to the last one, and make room. The last one
// waits for nobody: it looks at the word once, and who says so later than that knows it from what
// was there and adds the slice after all.
//
// Each slice is added once so, and in the same way by whoever does it. Who is done last with the
// arrivals takes their mark away: before, helpers may still look at them.
//
//   word of a pair      bits 0 .. 31  slices that were left     32  the last one has looked
//                       40 ..         who has done with the word and the arrivals
template <class Config>
class ScoreHelpers {
  static constexpr uint64_t kTaken = uint64_t{1} << 32, kDone = uint64_t{1} << 40;
  static constexpr int kPolls = 100;  // some 0.7 us each
  // More, or of fewer keys each, are no quicker on an H100: who waits keeps a multiprocessor from
  // the kernel that comes next.
  static constexpr int kMax = 15, kMinKeys = 512;
  static_assert(kMax <= 32, "a bit each");

 public:
  // Helpers of a pair of so many parts and keys.
  static __device__ __forceinline__ int count(int num_parts, int num_keys) {
    return min(min(kMax, num_parts - 1), ceil_div(num_keys, kMinKeys));
  }

  __device__ __forceinline__ ScoreHelpers(const PartialResults<Config>& partial, uint64_t* word,
                                          int count)
      : partial_(partial), word_(word), count_(count) {}

  // By the thread that opens the arrivals, before it does: who has arrived sees the word.
  static __device__ __forceinline__ void open(uint64_t* word) {
    ptx::store_relaxed(word, 0);
    ptx::fence();
  }

  // By one thread of a helper: the slices that are its.
  __device__ __forceinline__ uint32_t wait(int slice) const {
    for (int i = 0; i < kPolls; ++i) {
      if (partial_.all_arrived()) return 1u << slice;
    }
    const uint64_t before = ptx::atomic_add_acq_rel(word_, uint64_t{1} << slice);
    return before & kTaken ? 1u << slice : 0;
  }

  // By one thread of the last CTA: likewise.
  __device__ __forceinline__ uint32_t take() const {
    return static_cast<uint32_t>(ptx::atomic_add_acq_rel(word_, kTaken));
  }

  // By one thread of each CTA whose slices `wait` or `take` returned. A helper without one has been
  // counted by the last CTA.
  __device__ __forceinline__ void leave(bool is_last, uint32_t slices) const {
    if (!is_last && slices == 0) return;
    const uint64_t done = is_last ? 1 + __popc(slices) : 1;
    const uint64_t before = ptx::atomic_add_acq_rel(word_, done * kDone);
    if (before / kDone + done == count_ + 1u) partial_.close();
  }

 private:
  const PartialResults<Config>& partial_;
  uint64_t* const word_;
  const int count_;
};

// Adds to the sums of a pair what its keys weigh: by all threads of a CTA that has the lse of the
// rows, once all of its scores can be read.
template <class Config>
class ScoreSums {
 public:
  // Keys of a thread that are on the way together, and whether what is added to is on the way with
  // the scores: as registers allow.
  static constexpr int kBatch = Config::kWarpsPerSm <= 8 ? 8 : Config::kWarpsPerSm <= 12 ? 4 : 2;
  static constexpr bool kSumsAhead = Config::kWarpsPerSm <= 12;
  static constexpr int kStep = kBatch * Config::kThreads;

  __device__ __forceinline__ ScoreSums(const PagedAttentionArgs& args, const Sequence& sequence,
                                       int kv_head)
      : args_(args),
        num_keys_(static_cast<int>(min(int64_t{sequence.num_keys}, args.num_score_slots))),
        sums_gmem_(args.scores + sequence.seq_idx * args.stride_scores_seq +
                   kv_head * args.stride_scores_head) {}

  __device__ __forceinline__ int num_keys() const { return num_keys_; }

  // The sums of some keys into L2: who adds to them finds them there.
  __device__ __forceinline__ void prefetch(KeyRange keys) const {
    constexpr int kLine = 128 / sizeof(float);
    const int end = min(keys.end, num_keys_);
    for (int key = keys.begin + static_cast<int>(threadIdx.x) * kLine; key < end;
         key += Config::kThreads * kLine) {
      ptx::prefetch_l2(sums_gmem_ + key);
    }
  }

  // To those of slice `idx` of `count`. Calls `find_bases` when the first scores are on the way:
  // `base` then has of each row what its weights are powers against.
  template <class FindBases>
  __device__ __forceinline__ void add(const ScorePlaces& places, int idx, int count,
                                      const float* base, FindBases find_bases) {
    const int of_slice = (ceil_div(num_keys_, count) + 31) / 32 * 32;
    const int slice_begin = idx * of_slice, end = min(slice_begin + of_slice, num_keys_);
#pragma unroll 1
    for (int begin = slice_begin; begin < end; begin += kStep) {
      const int first = begin + static_cast<int>(threadIdx.x);
      float weights[kBatch] = {}, sums[kBatch];
      if constexpr (kSumsAhead) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i * Config::kThreads < end)
            sums[i] = sums_gmem_[first + i * Config::kThreads];
        }
      }
#pragma unroll 1
      for (int row = 0; row < args_.group; row += 4) {
        float4 scores[kBatch];
        const auto* const of_first =
            reinterpret_cast<const float4*>(places.template of<Config>(args_, begin, row / 4)) +
            threadIdx.x;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i * Config::kThreads < end) scores[i] = of_first[i * Config::kThreads];
        }
        if (row == 0 && begin == slice_begin) find_bases();
        add_rows(weights, scores, base + row, args_.group - row);
        if (begin >= places.near_end) discard(of_first, first, end);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * Config::kThreads >= end) break;
        float& sum = sums_gmem_[first + i * Config::kThreads];
        sum = (kSumsAhead ? sums[i] : sum) + weights[i];
      }
    }
  }

 private:
  static __device__ __forceinline__ void add_rows(float (&weights)[kBatch],
                                                  const float4 (&scores)[kBatch], const float* base,
                                                  int num_rows) {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      if (row >= num_rows) break;
      const float base_of_row = base[row];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float score = row == 0   ? scores[i].x
                            : row == 1 ? scores[i].y
                            : row == 2 ? scores[i].z
                                       : scores[i].w;
        weights[i] += ptx::exp2_approx(score - base_of_row);
      }
    }
  }

  // The scores of a step, of which a warp has 32 keys in a row at a time, need not go to memory.
  __device__ __forceinline__ void discard(const float4* of_first, int first, int end) const {
    constexpr int kLineKeys = 128 / sizeof(float4);
    static_assert(kBatch * 32 / kLineKeys <= 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int key = lane / 4 * Config::kThreads + lane % 4 * kLineKeys - lane;
    __syncwarp();  // all have read
    if (lane < kBatch * 4 && first + key < end) ptx::discard_l2(of_first + key);
  }

  const PagedAttentionArgs& args_;
  const int num_keys_;
  float* const sums_gmem_;
};

}  // namespace effllm
