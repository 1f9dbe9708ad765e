// Merges the parts that CTAs have of one pair (sequence, KV head): the last one to be done does it.
//
// Roofline: bytes, but small: 4 * D + 8 per row and part, written shortly before and found in L2.
// What counts is latency: a row is a warp's, and it has many parts on the way at a time.
//
// The memory is new in each call and holds anything, and nobody clears it beforehand: a counter of
// arrivals counts only while it bears a mark. The CTA of the first part sets that before it loads
// its first key, the last one to arrive takes it away. An arrival that does not find the mark, as
// that CTA is late, has counted nothing and tries again; CTAs start in the order of their numbers,
// and the first part's is the lowest, so it waits for a CTA that runs.
//
//   first part's CTA    mark, 0    loads and products    part 0 -> memory    + 1
//   the others                     loads and products    part p -> memory    + 1    = all: merges
//
// No finished call leaves a mark behind, in memory that then serves the next one or a graph's next
// replay. Other contents have it by chance only: 1 in 2^48, on top of a CTA that is late.
#pragma once

#include <cstdint>

#include "attention/decode_split.cuh"
#include "attention/online_softmax.cuh"
#include "ptx/atomic.cuh"
#include "ptx/cvt.cuh"

namespace effllm {

// Four neighbouring elements of the final output.
template <class Element>
__device__ __forceinline__ void store_output(const PagedAttentionArgs& args, int64_t row, int dim,
                                             float4 value) {
  auto* dst = static_cast<Element*>(args.out) + row * args.head_dim + dim;
  *reinterpret_cast<uint2*>(dst) = make_uint2(ptx::pack_pair<Element>(value.x, value.y),
                                              ptx::pack_pair<Element>(value.z, value.w));
}

inline constexpr int kArrivalBits = 16;
inline constexpr uint64_t kArrivalMark = uint64_t{0xE57A9D34C86B} << kArrivalBits;
inline constexpr int kMaxShares = (1 << kArrivalBits) - 1;

// The parts of one row tile of a pair. Where a cluster has each part, CTA `rank` of every cluster
// has the same rows of it, and their arrivals are counted for themselves.
template <class Config>
class PartialResults {
 public:
  __device__ __forceinline__ PartialResults(const PagedAttentionArgs& args, const DecodePart& part,
                                            int row_tile, uint32_t rank = 0)
      : args_(args),
        part_(part),
        row_tile_(row_tile),
        arrivals_(args.arrivals + slot_of(0) * Config::kMaxCluster + rank) {}

  // By one thread of the CTA that has the first part.
  __device__ __forceinline__ void open() const { ptx::store_relaxed(arrivals_, kArrivalMark); }

  // By one thread of each CTA, after all have written: whether the parts of all CTAs can be read.
  __device__ __forceinline__ bool arrive_last() const {
    if (count_up() + 1 != kArrivalMark + part_.num_parts) return false;
    close();
    return true;
  }

  // The same in pieces, for CTAs that wait for the last one: how many were earlier; whether all can
  // be read; and, once nobody looks any more, the end of it.
  __device__ __forceinline__ int arrive() const {
    return static_cast<int>(count_up() - kArrivalMark);
  }
  __device__ __forceinline__ bool all_arrived() const {
    return ptx::load_acquire(arrivals_) == kArrivalMark + part_.num_parts;
  }
  __device__ __forceinline__ void close() const { ptx::store_relaxed(arrivals_, 0); }

  // By a warp: the lse of a row of all parts, which 32 lanes look at side by side.
  __device__ __forceinline__ float lse(int row_in_tile) const {
    const int lane_idx = static_cast<int>(threadIdx.x % 32);
    SoftmaxRow total;
#pragma unroll 1
    for (int first = 0; first < part_.num_parts; first += 32) {
      const float2 softmax = load_softmax(first + lane_idx, row_in_tile);
      float maximum = fmaxf(total.maximum, softmax.x);
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lanes));
      }
      total.sum = total.sum * ptx::exp2_approx(total.maximum - maximum) +
                  ptx::exp2_approx(softmax.x - maximum) * softmax.y;
      total.maximum = maximum;
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      total.sum += __shfl_xor_sync(~0u, total.sum, lanes);
    }
    return total.lse2() * kLn2;
  }

  // Index of a row of part `idx`. Of the two places of a share one is for a pair's first part: of
  // several parts, it has at most one that is and one that is not.
  __device__ __forceinline__ int64_t row(int idx, int row_in_tile) const {
    const bool second = num_places() == 2 && idx == 0;
    return (slot_of(idx) * num_places() + second) * Config::kRows + row_in_tile;
  }

  // By a warp: outputs weighted by 2^(maximum - maximum of all) and added in the order of the
  // parts, whichever came last. Returns the row's lse.
  // `kBatch`: loads of a lane that are on the way together.
  template <int kBatch>
  __device__ __forceinline__ float merge(int row_in_tile, const OutputRow& out_row) const {
    const int lane_idx = static_cast<int>(threadIdx.x % 32);
    const int head_dim = static_cast<int>(args_.head_dim);
    const int num_parts = part_.num_parts;
    const int64_t first_row = row(0, row_in_tile), second_row = row(1, row_in_tile);
    const int64_t rows_per_part = int64_t{args_.num_row_tiles} * num_places() * Config::kRows;
    float lse = 0.f;
    for (int dim = lane_idx * 4; dim - lane_idx * 4 < head_dim; dim += 32 * 4) {
      float4 values[kBatch];
      const auto load_batch = [&](int first) {
        // All but the first part are equally far apart.
        const float* part =
            args_.partial_out + dim + (second_row + (first - 1) * rows_per_part) * head_dim;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float* src = first + i > 0 ? part : args_.partial_out + first_row * head_dim + dim;
          values[i] =
              first + i < num_parts && dim < head_dim
                  ? __ldcg(reinterpret_cast<const float4*>(src))  // past L1, as others wrote
                  : float4{};
          part += rows_per_part * head_dim;
        }
      };
      // The first values are on the way before their weights are known.
      float2 softmax = load_softmax(lane_idx, row_in_tile);
      load_batch(0);
      SoftmaxRow total;
      total.maximum = softmax.x;
      for (int idx = lane_idx + 32; idx < num_parts; idx += 32) {
        total.maximum = fmaxf(total.maximum, load_softmax(idx, row_in_tile).x);
      }
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        total.maximum = fmaxf(total.maximum, __shfl_xor_sync(~0u, total.maximum, lanes));
      }
      float4 sum = {};
      for (int first = 0; first < num_parts; first += kBatch) {
        if (first > 0) {
          softmax = load_softmax(first + lane_idx, row_in_tile);
          load_batch(first);
        }
        const float of_lane = ptx::exp2_approx(softmax.x - total.maximum);
        if (lane_idx < kBatch) total.sum += of_lane * softmax.y;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float weight = __shfl_sync(~0u, of_lane, i);
          if (first + i >= num_parts) break;
          sum.x += weight * values[i].x;
          sum.y += weight * values[i].y;
          sum.z += weight * values[i].z;
          sum.w += weight * values[i].w;
        }
      }
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        total.sum += __shfl_xor_sync(~0u, total.sum, lanes);
      }
      const float inverse = total.inverse_sum(sink_score(args_, out_row.head));
      if (dim < head_dim) {
        store_output<typename Config::Element>(
            args_, out_row.idx, dim,
            {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse});
      }
      lse = total.lse2() * kLn2;
      if (dim == 0) args_.lse[out_row.idx] = lse;
    }
    return lse;
  }

 private:
  // By one thread, once the mark is there. Returns what was there before.
  __device__ __forceinline__ uint64_t count_up() const {
    uint64_t before;
    do {
      before = ptx::atomic_add_acq_rel(arrivals_, 1);
    } while (before >> kArrivalBits != kArrivalMark >> kArrivalBits);
    return before;
  }

  __device__ __forceinline__ int64_t slot_of(int idx) const {
    return (int64_t{part_.first_slot} + idx) * args_.num_row_tiles + row_tile_;
  }

  __device__ __forceinline__ int num_places() const { return args_.split_size > 0 ? 1 : 2; }

  // Past L1: other CTAs wrote it.
  __device__ __forceinline__ float2 load_softmax(int idx, int row_in_tile) const {
    const auto* softmax = reinterpret_cast<const float2*>(args_.partial_softmax);
    return idx < part_.num_parts ? __ldcg(softmax + row(idx, row_in_tile))
                                 : make_float2(kNoMaximum, 0.f);
  }

  const PagedAttentionArgs& args_;
  const DecodePart& part_;
  const int row_tile_;
  uint64_t* const arrivals_;
};

}  // namespace effllm
