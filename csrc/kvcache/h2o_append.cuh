// The kernel of h2o_append: a CTA for each sequence and KV head.
//
// Roofline: bytes, 8 for every slot of a full head. All threads look for the slot of the lowest
// rank, with all that they read on the way together; then one warp writes the rows, its lower half
// that of K, its upper half that of V.
//
// Of few heads it is latency: a chain of misses, lengths, slots, page, rows. So the kernel may be
// launched before the one ahead is done, and asks until then for all of that to come to L2, going
// by the length that it finds. Everything is read again afterwards, at once: slots by that length,
// which but for a head that was changed in between is right.
//
//   kernel ahead   ... | done
//   before             | lines of slots, pages, rows -> L2
//   after                lengths, slots, pages, rows | lowest | rows -> slot
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "common/dispatch.h"
#include "cuda/launch.h"
#include "kvcache/h2o_append.h"
#include "kvcache/kv_row.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/load.cuh"

namespace effllm {

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

// Of the slots of one head, by all threads of a CTA: as many at a time, whatever that has.
template <int kThreads>
class SlotSearch {
  // Slots of a thread that are on the way together. One by one: heads need not start at a multiple
  // of 16 bytes, and a warp reads whole lines.
  static constexpr int kStep = 4608, kAhead = kStep / kThreads;
  static_assert(kStep % kThreads == 0);

 public:
  __device__ __forceinline__ SlotSearch(const float* scores, const int32_t* slot_pos)
      : scores_gmem_(scores), slot_pos_gmem_(slot_pos) {}

  // The slots of a step. What is not there has the highest rank of all.
  __device__ __forceinline__ void load(int begin, int num_slots) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int slot = thread_slot(begin, i);
      const bool used = slot < num_slots;
      scores_[i] = used ? scores_gmem_[slot] : 0.f;
      tokens_[i] = used ? slot_pos_gmem_[slot] : -1;
    }
  }

  // `loaded`: the number of slots that the first step has been loaded for. `found` has room for
  // each warp.
  __device__ __forceinline__ void run(const EvictionRule& rule, int num_slots, int loaded,
                                      LowestSlot* found) {
#pragma unroll 1
    for (int begin = 0; begin < num_slots; begin += kStep) {
      if (begin > 0 || num_slots != loaded) load(begin, num_slots);
      take(rule, begin, num_slots);
    }
    lowest_.take_of_warp();
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = lowest_;
  }

  // By a warp, after a barrier.
  static __device__ __forceinline__ int lowest_of(const LowestSlot* found) {
    LowestSlot lowest;
    if (threadIdx.x < kThreads / 32) lowest = found[threadIdx.x];
    lowest.take_of_warp();
    return lowest.slot;
  }

 private:
  static __device__ __forceinline__ int thread_slot(int begin, int i) {
    return begin + i * kThreads + static_cast<int>(threadIdx.x);
  }

  __device__ __forceinline__ void take(const EvictionRule& rule, int begin, int num_slots) {
    if (rule.normalize) {  // apart: divisions are long
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        scores_[i] = rule.value(scores_[i], tokens_[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i * kThreads >= num_slots) break;
      lowest_.take(EvictionRule::rank(rule.order(scores_[i], tokens_[i]), tokens_[i]),
                   thread_slot(begin, i));
    }
  }

  const float* const scores_gmem_;
  const int32_t* const slot_pos_gmem_;
  float scores_[kAhead];
  int32_t tokens_[kAhead];
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
#pragma unroll 1
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

// The new rows of K and V, on their way to shared memory while slots are compared, if they are
// short. Each half of the warp that writes them brings its own.
struct NewRows {
  static constexpr int kMaxBytes = 512;
  alignas(16) char at[2][kMaxBytes];

  static __device__ __forceinline__ bool take(const KvAppendParams& params) {
    return params.word_bytes == 16 && params.row_bytes <= kMaxBytes;
  }

  __device__ __forceinline__ void start(const KvAppendParams& params, const char* source) {
    const int lane = static_cast<int>(threadIdx.x % kRowLanes);
#pragma unroll 1
    for (int byte = lane * 16; byte < static_cast<int>(params.row_bytes); byte += kRowLanes * 16) {
      ptx::cp_async_16(at[threadIdx.x / kRowLanes] + byte, source + byte);
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ const char* wait() const {
    ptx::cp_async_wait<0>();
    __syncwarp();
    return at[threadIdx.x / kRowLanes];
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
  constexpr int kLine = 128;
  const auto lines = static_cast<int>((bytes + kLine - 1) / kLine);
  const auto* src = static_cast<const char*>(src_gmem);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < lines; i += static_cast<int>(blockDim.x)) {
    ptx::prefetch_l2(src + int64_t{i} * kLine);
  }
}

// What the kernel will read, as far as can be told while others may still write. Returns how many
// slots it is to read if all stays as it is.
__device__ __forceinline__ int prefetch_head(const H2oAppendParams& params,
                                             const AppendHead& head) {
  const int32_t num_slots = __ldcg(head.used);  // not to be found in L1 by who reads it later
  if (threadIdx.x == 0) ptx::prefetch_l2(params.positions + head.seq);
  for (const KvAppendRows* rows : {&params.append.k, &params.append.v}) {
    prefetch_bytes(head.row(*rows), params.append.row_bytes);
  }
  prefetch_bytes(head.page_row, params.max_pages_per_seq * sizeof(int32_t));
  if (num_slots < params.budget || num_slots > params.max_slots()) return 0;
  prefetch_bytes(head.scores, num_slots * sizeof(float));
  prefetch_bytes(head.slot_pos, num_slots * sizeof(int32_t));
  return num_slots;
}

template <class Writer, int kThreads>
__global__ void __launch_bounds__(kThreads)
    h2o_append_kernel(const __grid_constant__ H2oAppendParams params) {
  __shared__ LowestSlot found[kThreads / 32];
  __shared__ int32_t pages[kThreads];  // the first entries of the head's page table
  __shared__ NewRows new_rows;
  const AppendHead head(params, blockIdx.x);
  const int expected_slots = prefetch_head(params, head);
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  // All that is read, before anything waits for some of it.
  const bool has_entry = threadIdx.x < params.max_pages_per_seq;
  const int32_t table_entry = has_entry ? head.page_row[threadIdx.x] : 0;
  SlotSearch<kThreads> search(head.scores, head.slot_pos);
  search.load(0, expected_slots);
  const bool writes = threadIdx.x < 32, stages = NewRows::take(params.append);
  const KvAppendRows& rows = threadIdx.x < kRowLanes ? params.append.k : params.append.v;
  if (writes && stages) new_rows.start(params.append, head.row(rows));
  const int64_t position = params.positions[head.seq];
  const int32_t num_slots = *head.used;
  if (!params.is_position(position) || num_slots < 0 || num_slots > params.max_slots()) return;
  const bool full = num_slots >= params.budget;
  if (full) search.run(params.rule(position), num_slots, expected_slots, found);
  pages[threadIdx.x] = table_entry;
  __syncthreads();  // all know how many slots are in use
  if (!writes) return;
  const int slot = full ? SlotSearch<kThreads>::lowest_of(found) : num_slots;
  const auto [entry, offset] = params.place_of(slot);
  const int64_t page = params.valid_page(entry < kThreads ? pages[entry] : head.page_row[entry]);
  const char* const source = stages ? new_rows.wait() : head.row(rows);
  if (page < 0) return;
  const auto lane = static_cast<int>(threadIdx.x % kRowLanes);
  Writer::write(params.append, source, rows.target(page, offset, head.head), lane);
  if (threadIdx.x == 0) {
    head.scores[slot] = 0.f;
    head.slot_pos[slot] = static_cast<int32_t>(position);
    if (!full) *head.used = num_slots + 1;
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
  // Few heads want each to be done soon, many that more of them run beside one another.
  const bool few = pairs <= device_attribute(cudaDevAttrMultiProcessorCount, device, "h2o_append");
  const auto run = [&](auto kernel, unsigned threads) {
    const Launch launch{
        "h2o_append", dim3(static_cast<unsigned>(pairs)), dim3(threads), 0, stream, 1, early_start};
    launch(kernel, params);
  };
  const auto launch = [&]<class Writer>(Writer) {
    if (few) {
      run(h2o_append_kernel<Writer, 512>, 512);
    } else {
      run(h2o_append_kernel<Writer, 256>, 256);
    }
  };
  if (append.quantizes()) {
    return dispatch_kv_codec(append.cache_dtype,
                             [&]<class Codec>(Codec) { launch(EncodeRow<Codec>()); });
  }
  launch(CopyRow());
}

}  // namespace effllm
