// The kernel of h2o_append: a CTA for each sequence and KV head.
//
// Roofline: bytes, 8 for every slot of a full head. All threads look for the slot of the lowest
// rank, each with several vectors of slots on the way; then one warp writes the rows, its lower
// half that of K, its upper half that of V.
//
// Of few heads it is latency: a chain of misses, lengths, slots, page, rows. So the kernel may be
// launched before the one ahead is done, and asks until then for all of that to come to L2, going
// by the length that it finds; everything is read again afterwards.
//
//   kernel ahead   ... | done
//   before             | lines of slots, pages, rows -> L2
//   after                lengths, pages | slots -> lowest | rows -> slot
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "common/dispatch.h"
#include "cuda/launch.h"
#include "kvcache/h2o_append.h"
#include "kvcache/kv_row.cuh"
#include "ptx/grid.cuh"
#include "ptx/load.cuh"

namespace effllm {

inline constexpr int kEvictThreads = 256;

// The best slot that a thread, a warp, a CTA knows of.
struct LowestSlot {
  int64_t rank = INT64_MAX;
  int slot = 0;

  __device__ __forceinline__ void take(int64_t other_rank, int other_slot) {
    if (other_rank > rank || (other_rank == rank && other_slot >= slot)) return;
    rank = other_rank, slot = other_slot;
  }

  // Both halves of the rank one after the other, then the slot: an instruction each.
  __device__ __forceinline__ void take_of_warp() {
    const auto order = static_cast<int32_t>(rank >> 32);
    const auto token = static_cast<uint32_t>(rank);
    const int32_t lowest = __reduce_min_sync(~0u, order);
    const uint32_t oldest = __reduce_min_sync(~0u, order == lowest ? token : UINT32_MAX);
    const bool best = order == lowest && token == oldest;
    slot = __reduce_min_sync(~0u, best ? slot : INT32_MAX);
    rank = static_cast<int64_t>(lowest) * (int64_t{1} << 32) + oldest;
  }
};

// Of the slots of one head, by all threads of a CTA.
class SlotSearch {
 public:
  __device__ __forceinline__ SlotSearch(const EvictionRule& rule, const float* scores,
                                        const int32_t* slot_pos, int num_slots)
      : rule_(rule), scores_(scores), slot_pos_(slot_pos), num_slots_(num_slots) {}

  // `found` has room for each warp. The first one learns the slot.
  __device__ __forceinline__ int run(LowestSlot* found) {
    constexpr int kVector = 4, kAhead = 4;  // vectors of a thread that are on the way together
    constexpr int kStep = kEvictThreads * kVector;
    const auto addresses =
        reinterpret_cast<uintptr_t>(scores_) | reinterpret_cast<uintptr_t>(slot_pos_);
    int first = 0;
    if (addresses % 16 == 0) {
      for (; first < num_slots_; first += kAhead * kStep) {
        float4 scores[kAhead];
        int4 tokens[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int slot = first + i * kStep + static_cast<int>(threadIdx.x) * kVector;
          if (slot + kVector > num_slots_) continue;
          scores[i] = *reinterpret_cast<const float4*>(scores_ + slot);
          tokens[i] = *reinterpret_cast<const int4*>(slot_pos_ + slot);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int slot = first + i * kStep + static_cast<int>(threadIdx.x) * kVector;
          if (slot + kVector > num_slots_) continue;
          take(scores[i].x, tokens[i].x, slot);
          take(scores[i].y, tokens[i].y, slot + 1);
          take(scores[i].z, tokens[i].z, slot + 2);
          take(scores[i].w, tokens[i].w, slot + 3);
        }
      }
      first = num_slots_ / kVector * kVector;
    }
    for (int slot = first + static_cast<int>(threadIdx.x); slot < num_slots_;
         slot += kEvictThreads) {
      take(scores_[slot], slot_pos_[slot], slot);
    }
    lowest_.take_of_warp();
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = lowest_;
    __syncthreads();
    if (threadIdx.x >= 32) return 0;
    lowest_ = threadIdx.x < kEvictThreads / 32 ? found[threadIdx.x] : LowestSlot();
    lowest_.take_of_warp();
    return lowest_.slot;
  }

 private:
  __device__ __forceinline__ void take(float score, int32_t token, int slot) {
    lowest_.take(EvictionRule::rank(rule_.order(score, token), token), slot);
  }

  const EvictionRule rule_;
  const float* const scores_;
  const int32_t* const slot_pos_;
  const int num_slots_;
  LowestSlot lowest_;
};

// How 16 lanes write a row into its slot. One warp does it once: what rows are made of is asked
// there, and not compiled in.
struct CopyRow {
  static __device__ __forceinline__ void write(const KvAppendParams& params, const char* source,
                                               const KvRowTarget& target, int lane) {
    if (params.word_bytes == 16) {
      copy<uint4>(params, source, target.row, lane);
    } else {
      copy<uint16_t>(params, source, target.row, lane);
    }
  }

 private:
  template <class Word>
  static __device__ __forceinline__ void copy(const KvAppendParams& params, const char* source,
                                              char* target, int lane) {
    const auto words = static_cast<int>(params.row_bytes / sizeof(Word));
    for (int idx = lane; idx < words; idx += kRowLanes) {
      reinterpret_cast<Word*>(target)[idx] = reinterpret_cast<const Word*>(source)[idx];
    }
  }
};

template <class Codec>
struct EncodeRow {
  static __device__ __forceinline__ void write(const KvAppendParams& params, const char* source,
                                               const KvRowTarget& target, int lane) {
    if (params.word_bytes == 16) {
      encode<8>(params, source, target, lane);
    } else {
      encode<2>(params, source, target, lane);
    }
  }

 private:
  template <int kVector>
  struct Floats {
    float at[kVector];
  };

  template <class T, int kVector>
  static __device__ __forceinline__ void load(const char* source, int d, int dim,
                                              Floats<kVector>& x) {
    const auto row =
        RowVector<T, kVector>::load(reinterpret_cast<const device_t<T>*>(source), d, dim);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x.at[i] = device_to_float(row.at[i]);
  }

  template <int kVector>
  static __device__ __forceinline__ void encode(const KvAppendParams& params, const char* source,
                                                const KvRowTarget& target, int lane) {
    const auto dim = static_cast<int>(params.head_dim);
    quantize_row<Codec, kVector>(lane, dim, target, [&](int d) {
      Floats<kVector> x;
      if (params.dtype == DType::kBFloat16) {
        load<bfloat16, kVector>(source, d, dim, x);
      } else if (params.dtype == DType::kFloat16) {
        load<float16, kVector>(source, d, dim, x);
      } else {
        load<float, kVector>(source, d, dim, x);
      }
      return x;
    });
  }
};

// A sequence and KV head, and where it has its state.
struct AppendHead {
  int64_t seq, head;
  float* scores;
  int32_t* slot_pos;
  int32_t* used;  // slots in use
  const int32_t* page_row;

  __device__ __forceinline__ AppendHead(const H2oAppendParams& params, unsigned idx) {
    const auto num_heads = static_cast<unsigned>(params.append.num_kv_heads);
    seq = idx / num_heads;
    head = idx % num_heads;
    scores = params.scores + seq * params.stride_scores_seq + head * params.stride_scores_head;
    slot_pos =
        params.slot_pos + seq * params.stride_slot_pos_seq + head * params.stride_slot_pos_head;
    used = params.seq_lens + seq * params.stride_seq_lens_seq + head;
    page_row = params.page_table + seq * params.stride_page_table_seq +
               head * params.stride_page_table_head;
  }

  __device__ __forceinline__ const char* row(const KvAppendRows& rows) const {
    return rows.tokens + seq * rows.stride_token_bytes + head * rows.stride_head_bytes;
  }
};

// By all threads: so many bytes to L2.
__device__ __forceinline__ void prefetch_bytes(const void* src_gmem, int64_t bytes) {
  constexpr int64_t kLine = 128;
  const auto* src = static_cast<const char*>(src_gmem);
  for (int64_t i = threadIdx.x * kLine; i < bytes; i += kEvictThreads * kLine) {
    ptx::prefetch_l2(src + i);
  }
}

// What the kernel will read, as far as can be told while others may still write.
__device__ __forceinline__ void prefetch_head(const H2oAppendParams& params,
                                              const AppendHead& head) {
  const int32_t num_slots = __ldcg(head.used);  // not to be found in L1 by who reads it later
  if (threadIdx.x == 0) ptx::prefetch_l2(params.positions + head.seq);
  for (const KvAppendRows* rows : {&params.append.k, &params.append.v}) {
    prefetch_bytes(head.row(*rows), params.append.row_bytes);
  }
  prefetch_bytes(head.page_row, params.max_pages_per_seq * sizeof(int32_t));
  if (num_slots < params.budget || num_slots > params.max_slots()) return;
  prefetch_bytes(head.scores, num_slots * sizeof(float));
  prefetch_bytes(head.slot_pos, num_slots * sizeof(int32_t));
}

template <class Writer>
__global__ void __launch_bounds__(kEvictThreads)
    h2o_append_kernel(const __grid_constant__ H2oAppendParams params) {
  __shared__ LowestSlot found[kEvictThreads / 32];
  __shared__ int32_t pages[kEvictThreads];  // the first entries of the head's page table
  const AppendHead head(params, blockIdx.x);
  prefetch_head(params, head);
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  const int64_t position = params.positions[head.seq];
  const int32_t num_slots = *head.used;
  if (threadIdx.x < params.max_pages_per_seq) pages[threadIdx.x] = head.page_row[threadIdx.x];
  if (!params.is_position(position) || num_slots < 0 || num_slots > params.max_slots()) return;
  __syncthreads();  // all know how many slots are in use
  int slot = num_slots;
  if (num_slots >= params.budget) {
    slot = SlotSearch(params.rule(position), head.scores, head.slot_pos, num_slots).run(found);
  }
  if (threadIdx.x >= 32) return;
  const auto [entry, offset] = params.place_of(slot);
  const int64_t page =
      params.valid_page(entry < kEvictThreads ? pages[entry] : head.page_row[entry]);
  if (page < 0) return;
  const auto lane = static_cast<int>(threadIdx.x % kRowLanes);
  const KvAppendRows& rows = threadIdx.x < kRowLanes ? params.append.k : params.append.v;
  Writer::write(params.append, head.row(rows), rows.target(page, offset, head.head), lane);
  if (threadIdx.x == 0) {
    head.scores[slot] = 0.f;
    head.slot_pos[slot] = static_cast<int32_t>(position);
    if (num_slots < params.budget) *head.used = num_slots + 1;
  }
}

inline void launch_h2o_append(const H2oAppendParams& params, int device, cudaStream_t stream) {
  const KvAppendParams& append = params.append;
  const int64_t pairs = append.num_tokens * append.num_kv_heads;
  if (pairs > INT32_MAX || append.head_dim > INT32_MAX / 8) {
    fail("h2o_append", "B * HKV must be below 2^31 and D below 2^28, got " + std::to_string(pairs) +
                           " and " + std::to_string(append.head_dim));
  }
  const bool early_start =
      device_attribute(cudaDevAttrComputeCapabilityMajor, device, "h2o_append") >= 9;
  const auto launch = [&]<class Writer>(Writer) {
    const Launch launch{
        "h2o_append", dim3(static_cast<unsigned>(pairs)), dim3(kEvictThreads), 0, stream, 1,
        early_start};
    launch(h2o_append_kernel<Writer>, params);
  };
  if (append.quantizes()) {
    return dispatch_kv_codec(append.cache_dtype,
                             [&]<class Codec>(Codec) { launch(EncodeRow<Codec>()); });
  }
  launch(CopyRow());
}

}  // namespace effllm
