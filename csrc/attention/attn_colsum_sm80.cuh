// Column sums of attention weights, on mma.sync: keys outside, queries inside, as gradients of keys
// are computed, so that nobody else has a part of a sum.
//
// Roofline: arithmetic, 2 * D operations for each pair of a query row and a key that it sees, half
// of what attention itself takes. For few queries (last_n) bytes: each key is read once.
//
//   S^T[keys, rows] = K Q^T    K in registers as A fragments, 16 or 32 keys of each warp, for good;
//                              Q through shared memory, the rows of a stage of the loop
//   2^(S - base)               base of each row: its lse, a sink's share included
//   sums                       a lane has keys g and g + 8 of a tile of 16, and adds over its rows;
//                              its quad is added up when all is done
//
// First key tiles, which under the causal mask see the most rows, come first.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <string>

#include "attention/code_chunk.cuh"
#include "attention/online_softmax.cuh"
#include "attention/paged_sequence.cuh"
#include "common/math.h"
#include "cuda/launch.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/load.cuh"
#include "ptx/mma.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// The kernel's argument.
struct AttnColsumArgs {
  PagedAttentionArgs attention;  // prepared; `lse` is read
  int64_t stride_lse_token;
  float* out;  // [B, HKV, max_keys]
  int64_t stride_out_seq, stride_out_head;
  int32_t max_keys, last_n;
  bool accumulates;  // sums are added to what `out` holds; else it is written up to its end
};

template <class Element_, int kHeadDim_>
struct AttnColsumConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // D rounded up; loads past D give zeros
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  // A fragment of Q that a warp reads serves 32 keys, or 16 where more would not fit in registers.
  static constexpr int kKeyTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpKeys = kKeyTiles * 16;
  static constexpr int kBlockKeys = kWarps * kWarpKeys;
  static constexpr int kRows = kHeadDim <= 128 ? 64 : 32;  // of a stage
};

template <class Config>
struct AttnColsumStorage {
  union {
    uint4 k[Config::kBlockKeys][Config::kChunks];  // until it is in registers
    uint4 q[2][Config::kRows][Config::kChunks];
  };
  int64_t k_offset[Config::kBlockKeys];  // in elements
  uint32_t k_word[Config::kBlockKeys];   // of quantised caches
  // Of the rows of two stages: what weights are powers against, and where the keys end that they
  // see: 0 for rows that are none.
  alignas(8) float base[2][Config::kRows];
  alignas(8) int end[2][Config::kRows];
};

template <class Config>
class AttnColsum {
  using Element = typename Config::Element;
  using Storage = AttnColsumStorage<Config>;
  using Scores = float[2][4];  // of 16 keys and 16 rows

 public:
  __device__ __forceinline__ AttnColsum(const AttnColsumArgs& args, Storage& smem, int pair_idx,
                                        int first_key)
      : args_(args),
        smem_(smem),
        sequence_(args.attention, pair_idx / args.attention.heads_per_table),
        kv_head_(sequence_.first_kv_head + pair_idx % args.attention.heads_per_table),
        first_key_(first_key),
        num_keys_(min(sequence_.num_keys, args.max_keys)),
        num_rows_(sequence_.num_queries * args.attention.group),
        lane_idx_(threadIdx.x % 32),
        warp_key_(threadIdx.x / 32 * Config::kWarpKeys) {
    // The first query that counts and sees the first key.
    const int counted = max(sequence_.num_queries - args.last_n, 0);
    const int query_idx = max(counted, first_key - sequence_.first_position);
    first_row_ = min(query_idx, sequence_.num_queries) * args.attention.group;
  }

  __device__ __forceinline__ void run() {
    if (first_key_ < num_keys_ && first_row_ < num_rows_) sum_rows();
    store();
  }

 private:
  // Of a chunk of a row: the eight rows of an ldmatrix hit all banks.
  static __device__ __forceinline__ int place_of(int row, int chunk) { return chunk ^ (row & 7); }

  __device__ __forceinline__ void sum_rows() {
    load_keys();
    const int num_stages = ceil_div(num_rows_ - first_row_, Config::kRows);
    load_queries(0);
    store_bases(0, load_lse(0));
    for (int stage = 0; stage < num_stages; ++stage) {
      const bool more = stage + 1 < num_stages;
      if (more) load_queries(stage + 1);
      const float next_lse = more ? load_lse(stage + 1) : 0.f;
      if (more) {
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      __syncthreads();  // the rows of this stage are there
      add_weights(stage % 2);
      if (more) store_bases(stage + 1, next_lse);
      __syncthreads();  // all are done with this stage's rows
    }
  }

  // Through shared memory into fragments. Keys past the last are zeros.
  __device__ __forceinline__ void load_keys() {
    const PagedAttentionArgs& args = args_.attention;
    if (threadIdx.x < Config::kBlockKeys) {
      const int key = first_key_ + static_cast<int>(threadIdx.x);
      const bool valid = key < num_keys_;
      smem_.k_offset[threadIdx.x] = 0;
      smem_.k_word[threadIdx.x] = 0;
      if (valid) {
        const KeyLocation location = locate_key(args, sequence_.page_row, key);
        smem_.k_offset[threadIdx.x] = location.k_offset(args, kv_head_);
        if (args.k_scales.words != nullptr) {
          smem_.k_word[threadIdx.x] = location.word(args.k_scales, kv_head_);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Config::kKeyTiles * 2; ++i) scale_[i / 2][i % 2] = 1.f;
    switch (args.kv_dtype) {
      case DType::kFloat8E4M3:
        load_codes<KvOctet<KvE4M3>>();
        break;
      case DType::kInt8:
        load_codes<KvOctet<KvInt8>>();
        break;
      case DType::kUInt8:
        load_codes<KvOctet<KvInt4>>();
        break;
      default:
        each_chunk([&](int row, int chunk, bool valid) {
          const auto* src = static_cast<const Element*>(args.k_cache) +
                            (valid ? smem_.k_offset[row] + chunk * 8 : 0);
          ptx::cp_async_16(&smem_.k[row][place_of(row, chunk)], src, valid);
        });
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < Config::kKeyTiles; ++tile) {
      const int row = warp_key_ + tile * 16 + lane_idx_ % 16;
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        const int chunk = step * 2 + lane_idx_ / 16;
        ptx::ldmatrix_x4(k_[tile][step], &smem_.k[row][place_of(row, chunk)]);
      }
    }
    __syncthreads();  // queries may come
  }

  template <class Octet>
  __device__ __forceinline__ void load_codes() {
    constexpr int kBytes = Octet::kWords * 4;
    each_chunk([&](int row, int chunk, bool valid) {
      uint32_t codes[Octet::kWords] = {};
      const char* src =
          static_cast<const char*>(args_.attention.k_cache) + smem_.k_offset[row] + chunk * kBytes;
      if (valid) ptx::load_streaming<Octet::kWords>(codes, src);
      smem_.k[row][place_of(row, chunk)] =
          elements_of_codes<Octet, Element>(codes, Octet::bias(smem_.k_word[row]));
    });
#pragma unroll
    for (int i = 0; i < Config::kKeyTiles * 2; ++i) {
      scale_[i / 2][i % 2] = Octet::scale(smem_.k_word[key_of(i / 2, i % 2)]);
    }
  }

  // Calls body(row, chunk, valid) for this thread's chunks of the tile of keys.
  template <class Body>
  __device__ __forceinline__ void each_chunk(const Body& body) const {
    const int dim_chunks = static_cast<int>(args_.attention.head_dim) / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < Config::kBlockKeys * Config::kChunks; i += Config::kThreads) {
      const int row = i / Config::kChunks, chunk = i % Config::kChunks;
      body(row, chunk, first_key_ + row < num_keys_ && chunk < dim_chunks);
    }
  }

  // The place in the CTA's tile of key i (0, 1) that this lane has of a tile of 16.
  __device__ __forceinline__ int key_of(int tile, int i) const {
    return warp_key_ + tile * 16 + lane_idx_ / 4 + i * 8;
  }

  __device__ __forceinline__ int row_of(int stage, int idx) const {
    return first_row_ + stage * Config::kRows + idx;
  }

  __device__ __forceinline__ void load_queries(int stage) {
    const PagedAttentionArgs& args = args_.attention;
    const auto* q = static_cast<const Element*>(args.q);
    const int dim_chunks = static_cast<int>(args.head_dim) / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < Config::kRows * Config::kChunks; i += Config::kThreads) {
      const int idx = i / Config::kChunks, chunk = i % Config::kChunks;
      const int row = row_of(stage, idx);
      const bool valid = row < num_rows_ && chunk < dim_chunks;
      const Element* src = q;
      if (valid) {
        const int query_idx = static_cast<int>(args.group_divisor.quotient(row));
        const int head = kv_head_ * args.group + row - query_idx * args.group;
        src += (sequence_.first_token + query_idx) * args.stride_q_token +
               head * args.stride_q_head + chunk * 8;
      }
      ptx::cp_async_16(&smem_.q[stage % 2][idx][place_of(idx, chunk)], src, valid);
    }
    ptx::cp_async_commit();
  }

  // Of this thread's row of a stage.
  __device__ __forceinline__ float load_lse(int stage) const {
    const PagedAttentionArgs& args = args_.attention;
    const int row = row_of(stage, threadIdx.x);
    if (threadIdx.x >= Config::kRows || row >= num_rows_) return 0.f;
    const int query_idx = static_cast<int>(args.group_divisor.quotient(row));
    const int head = kv_head_ * args.group + row - query_idx * args.group;
    return args.lse[(sequence_.first_token + query_idx) * args_.stride_lse_token + head];
  }

  __device__ __forceinline__ void store_bases(int stage, float lse) {
    const PagedAttentionArgs& args = args_.attention;
    if (threadIdx.x >= Config::kRows) return;
    const int row = row_of(stage, threadIdx.x);
    int end = 0;
    float base = 0.f;
    if (row < num_rows_) {
      const int query_idx = static_cast<int>(args.group_divisor.quotient(row));
      const int head = kv_head_ * args.group + row - query_idx * args.group;
      end = min(sequence_.visible_keys(args, query_idx).end, num_keys_);
      base = weight_base(lse, sink_score(args, head));
    }
    smem_.end[stage % 2][threadIdx.x] = end;
    smem_.base[stage % 2][threadIdx.x] = base;
  }

  // A stage's rows, 16 at a time.
  __device__ __forceinline__ void add_weights(int buffer) {
    // Ends ascend, but for rows that are none.
    const int least_end = min(smem_.end[buffer][0], smem_.end[buffer][Config::kRows - 1]);
    const bool whole = first_key_ + Config::kBlockKeys <= least_end;
    float sums[Config::kKeyTiles][2] = {};  // few terms first: they lose fewer bits
#pragma unroll 1
    for (int first = 0; first < Config::kRows; first += 16) {
      Scores scores[Config::kKeyTiles] = {};
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        // As B fragments: left and right half of rows 0-7 of the 16, then of rows 8-15.
        const int row = first + lane_idx_ / 16 * 8 + lane_idx_ % 8;
        const int chunk = step * 2 + lane_idx_ / 8 % 2;
        uint32_t q[4];
        ptx::ldmatrix_x4(q, &smem_.q[buffer][row][place_of(row, chunk)]);
#pragma unroll
        for (int tile = 0; tile < Config::kKeyTiles; ++tile) {
          ptx::mma_m16n8k16<Element>(scores[tile][0], k_[tile][step], q[0], q[1]);
          ptx::mma_m16n8k16<Element>(scores[tile][1], k_[tile][step], q[2], q[3]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < Config::kKeyTiles; ++tile) {
        add_scores(scores[tile], tile, buffer, first, whole, sums[tile]);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kKeyTiles * 2; ++i) sums_[i / 2][i % 2] += sums[i / 2][i % 2];
  }

  __device__ __forceinline__ void add_scores(Scores& scores, int tile, int buffer, int first,
                                             bool whole, float (&sums)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[half][i] *= scale_[tile][i / 2];
    }
    ScoreMap(args_.attention).apply(scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + half * 8 + lane_idx_ % 4 * 2;
      const auto base = *reinterpret_cast<const float2*>(&smem_.base[buffer][row]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = ptx::exp2_approx(scores[half][i] - (i % 2 == 0 ? base.x : base.y));
        if (!whole && first_key_ + key_of(tile, i / 2) >= smem_.end[buffer][row + i % 2]) {
          weight = 0.f;
        }
        sums[i / 2] += weight;
      }
    }
  }

  __device__ __forceinline__ void store() const {
    float* const out =
        args_.out + sequence_.seq_idx * args_.stride_out_seq + kv_head_ * args_.stride_out_head;
#pragma unroll
    for (int tile = 0; tile < Config::kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sums_[tile][i];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int key = first_key_ + key_of(tile, i);
        if (lane_idx_ % 4 != 0 || key >= (args_.accumulates ? num_keys_ : args_.max_keys)) continue;
        out[key] = args_.accumulates ? out[key] + sum : sum;
      }
    }
  }

  const AttnColsumArgs& args_;
  Storage& smem_;
  const Sequence sequence_;
  const int kv_head_, first_key_, num_keys_, num_rows_, lane_idx_, warp_key_;
  int first_row_;
  uint32_t k_[Config::kKeyTiles][Config::kSteps][4];
  float scale_[Config::kKeyTiles][2];  // of this lane's keys
  float sums_[Config::kKeyTiles][2] = {};
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    attn_colsum_kernel(const __grid_constant__ AttnColsumArgs args) {
  __shared__ AttnColsumStorage<Config> smem;
  const auto num_pairs =
      static_cast<unsigned>(args.attention.num_tables * args.attention.heads_per_table);
  const auto tile = static_cast<int>(blockIdx.x / num_pairs);
  AttnColsum<Config>(args, smem, static_cast<int>(blockIdx.x % num_pairs),
                     tile * Config::kBlockKeys)
      .run();
}

template <class Element, int kHeadDim>
void launch_attn_colsum(const char* op, const AttnColsumArgs& args, cudaStream_t stream) {
  using Config = AttnColsumConfig<Element, kHeadDim>;
  const PagedAttentionArgs& attention = args.attention;
  const int64_t rows = attention.group * attention.max_seqlen_q;
  const int64_t pairs = attention.num_seqs * attention.num_kv_heads;
  const int64_t blocks = ceil_div<int64_t>(args.max_keys, Config::kBlockKeys) * pairs;
  if (rows > INT_MAX - Config::kRows || blocks > INT_MAX) {
    fail(op, "HQ / HKV * T and the number of tiles of keys must be below 2^31, got " +
                 std::to_string(rows) + " and " + std::to_string(blocks));
  }
  const Launch launch{op, dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), 0, stream};
  launch(attn_colsum_kernel<Config>, args);
}

// Of any cache. There is a pair of a sequence and a KV head, and a key that is asked for.
template <class Element>
void launch_attn_colsum(const char* op, const AttnColsumArgs& args, cudaStream_t stream) {
  if (args.attention.head_dim <= 64) {
    launch_attn_colsum<Element, 64>(op, args, stream);
  } else if (args.attention.head_dim <= 128) {
    launch_attn_colsum<Element, 128>(op, args, stream);
  } else {
    launch_attn_colsum<Element, 256>(op, args, stream);
  }
}

// Compiled in attn_colsum.cu.
extern template void launch_attn_colsum<float16>(const char*, const AttnColsumArgs&, cudaStream_t);
extern template void launch_attn_colsum<bfloat16>(const char*, const AttnColsumArgs&, cudaStream_t);

}  // namespace effllm
