// Paged attention for few query rows: decode and short speculative steps, keys split over CTAs.
//
// Roofline: bytes. Each key costs 4 * D bytes of K and V (in e4m3 and int8 2 * D + 8, in int4 D +
// 8), read once; an H100 reads 3.06 TB/s. Nothing is staged: a warp loads 16 keys from the cache
// straight into the registers of mma fragments (decode_kv.cuh), so any page size, stride and dtype
// costs the same.
//
//   part of a row tile:     keys  [ tile | tile | tile | ... ]    16 keys each
//                           warp      0      1      2   ...  0 ..
//
// Warps merge in shared memory, parts in the CTA that is done last (combine.cuh), both in a fixed
// order. Who has which part says decode_split.cuh.
//
// For one sequence time is latency, and hides little: launch, lengths, page table, keys, values,
// merge. So the kernel may be launched before the one ahead is done, and asks for lengths and page
// table to come to L2 until then; a warp has a tile of K and of V on the way at any time, of D =
// 128 in 16 bits 64 KiB per multiprocessor, where 3 TB/s over 132 of them at 0.8 us need 18 KiB;
// and there are then no more CTAs than multiprocessors, so that little has to be merged.
#pragma once

#include <cstdint>

#include "attention/alibi.cuh"
#include "attention/combine.cuh"
#include "attention/decode_kv.cuh"
#include "attention/decode_split.cuh"
#include "attention/online_softmax.cuh"
#include "cuda/launch.h"
#include "ptx/grid.cuh"
#include "ptx/load.cuh"

namespace effllm {

// What the CTA works on, and the warps' results, merged after the loop.
template <class Config>
struct PagedDecodeStorage {
  DecodeSchedule<Config> schedule;
  int row_tile;
  // Rows are padded by 16 bytes against bank conflicts.
  alignas(16) float output[Config::kWarps][Config::kRows][Config::kHeadDim + 4];
  float maximum[Config::kWarps][Config::kRows];
  float sum[Config::kWarps][Config::kRows];
  AlibiRow alibi[Config::kRows];  // unless there are no slopes
  bool is_last;                   // this CTA merges the parts
};

template <class Config>
class PagedDecode {
  using Element = typename Config::Element;
  using Tile = DecodeTile<Config>;
  using Kv = DecodeKv<Config>;

 public:
  __device__ __forceinline__ PagedDecode(const PagedAttentionArgs& args, const Sequence& sequence,
                                         const Tile& tile, int kv_head, const AlibiRow* alibi)
      : args_(args),
        alibi_(alibi),
        kv_(args, sequence, kv_head),
        group_lane_(threadIdx.x % 32 / 4),
        quad_lane_(threadIdx.x % 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile.first_row + quad_lane_ * 2 + i;
      visible_[i] = row < tile.num_rows
                        ? sequence.visible_keys(args, args.group_divisor.quotient(row))
                        : KeyRange{0, 0};
    }
    kv_.load_queries(tile.first_row, tile.num_rows);
  }

  // One warp's share of the keys of a part.
  __device__ __forceinline__ void run(KeyRange keys) {
    constexpr int kStride = Config::kWarps * Config::kTileKeys;
    int key = keys.begin + threadIdx.x / 32 * Config::kTileKeys;
    if (key < keys.end) kv_.load_keys(key, keys.end);
    for (; key < keys.end; key += kStride) {
      if constexpr (Config::kOverlapLoads) kv_.load_values(key, keys.end);
      float scores[1][4] = {};
      kv_.compute_scores(scores[0]);
      if constexpr (!Config::kOverlapLoads) kv_.load_values(key, keys.end);
      const bool more = key + kStride < keys.end;
      if (Config::kOverlapLoads && more) kv_.load_keys(key + kStride, keys.end);
      softmax(scores, key, keys.end);
      kv_.accumulate(output_, scores[0]);
      if (!Config::kOverlapLoads && more) kv_.load_keys(key + kStride, keys.end);
    }
    finish_sums();
    kv_.finish(output_);
  }

  __device__ __forceinline__ void store(PagedDecodeStorage<Config>& smem) const {
    const int warp_idx = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = quad_lane_ * 2 + i;
      if (group_lane_ == 0) {
        smem.maximum[warp_idx][row] = rows_[i].maximum;
        smem.sum[warp_idx][row] = rows_[i].sum;
      }
#pragma unroll
      for (int tile = 0; tile < Kv::kDimTiles; ++tile) {
        float* dim = &smem.output[warp_idx][row][kv_.first_dim(tile)];
        if constexpr (Kv::kPairDistance == 1) {
          *reinterpret_cast<float2*>(dim) = make_float2(output_[tile][i], output_[tile][i + 2]);
        } else {
          dim[0] = output_[tile][i];
          dim[Kv::kPairDistance] = output_[tile][i + 2];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void softmax(float (&scores)[1][4], int first_key, int end) {
    ScoreMap(args_).apply(scores);
    if (args_.alibi_slopes != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + i / 2 * 8 + group_lane_;
        scores[0][i] = alibi_[quad_lane_ * 2 + i % 2].biased(scores[0][i], key);
      }
    }
    float maximum[2] = {rows_[0].maximum, rows_[1].maximum};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first_key + i / 2 * 8 + group_lane_;
      float& x = scores[0][i];
      if (key >= end || !visible_[i % 2].contains(key)) x = kMaskedScore;
      maximum[i % 2] = fmaxf(maximum[i % 2], x);
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      maximum[0] = fmaxf(maximum[0], __shfl_xor_sync(~0u, maximum[0], lanes));
      maximum[1] = fmaxf(maximum[1], __shfl_xor_sync(~0u, maximum[1], lanes));
    }
    // Rescaling can wait while weights stay under 2^8: rare, and a branch of the whole warp.
    constexpr float kSlack = 8.f;
    if (__any_sync(~0u, maximum[0] > rows_[0].maximum + kSlack ||
                            maximum[1] > rows_[1].maximum + kSlack)) {
      rescale(maximum);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[0][i] = ptx::exp2_approx(scores[0][i] - rows_[i % 2].maximum);
      rows_[i % 2].sum += scores[0][i];
    }
    if constexpr (Config::kQuantized) {
      float factor;
      if (kv_.scale_weights(scores[0], factor)) {
#pragma unroll
        for (auto& tile : output_) {
#pragma unroll
          for (float& sum : tile) sum *= factor;
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&maximum)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float factor = ptx::exp2_approx(rows_[row].maximum - maximum[row]);
      rows_[row].maximum = maximum[row];
      rows_[row].sum *= factor;
#pragma unroll
      for (int tile = 0; tile < Kv::kDimTiles; ++tile) {
        output_[tile][row] *= factor;
        output_[tile][row + 2] *= factor;
      }
    }
  }

  __device__ __forceinline__ void finish_sums() {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      rows_[0].sum += __shfl_xor_sync(~0u, rows_[0].sum, lanes);
      rows_[1].sum += __shfl_xor_sync(~0u, rows_[1].sum, lanes);
    }
  }

  const PagedAttentionArgs& args_;
  const AlibiRow* const alibi_;  // of the row tile, in shared memory
  Kv kv_;
  const int group_lane_, quad_lane_;
  KeyRange visible_[2];  // of rows 2c and 2c + 1
  SoftmaxRow rows_[2];
  typename Kv::Output output_ = {};
};

// Four dims of one row: the warps' shares in the order of the warps, not yet divided by the sum of
// weights. `total` gets the row's softmax.
template <class Config>
__device__ __forceinline__ float4 merge_warps(const PagedDecodeStorage<Config>& smem, int row,
                                              int dim, SoftmaxRow& total) {
  for (int warp = 0; warp < Config::kWarps; ++warp) {
    total.maximum = fmaxf(total.maximum, smem.maximum[warp][row]);
  }
  float4 sum = {};
#pragma unroll
  for (int warp = 0; warp < Config::kWarps; ++warp) {
    const float factor = ptx::exp2_approx(smem.maximum[warp][row] - total.maximum);
    const auto value = *reinterpret_cast<const float4*>(&smem.output[warp][row][dim]);
    total.sum += factor * smem.sum[warp][row];
    sum.x += factor * value.x;
    sum.y += factor * value.y;
    sum.z += factor * value.z;
    sum.w += factor * value.w;
  }
  return sum;
}

// Lengths and, if it is not large, the page table into L2. Allowed while the kernel ahead may still
// write them: nothing is read.
template <class Config>
__device__ __forceinline__ void prefetch_tables(const PagedAttentionArgs& args) {
  constexpr int64_t kLineInts = 128 / sizeof(int32_t), kMaxTableInts = 64 * 1024;
  const int64_t idx = (int64_t{blockIdx.x} * Config::kThreads + threadIdx.x) * kLineInts;
  if (idx < args.num_seqs) {
    ptx::prefetch_l2(args.seq_lens + idx);
    ptx::prefetch_l2(args.cu_seqlens_q + idx);
  }
  const int64_t table = (args.num_seqs - 1) * args.stride_page_table_seq + args.max_pages_per_seq;
  if (idx < table && table <= kMaxTableInts) ptx::prefetch_l2(args.page_table + idx);
}

// The keys' entries of the page table into L2, 32 of them by each thread: of small pages there are
// many, and what a warp reads of them is not what it has read in the step before.
__device__ __forceinline__ void prefetch_page_row(const PagedAttentionArgs& args,
                                                  const Sequence& sequence, KeyRange keys) {
  const auto entry = args.page_size_divisor.quotient(keys.begin) + threadIdx.x * 32;
  if (keys.begin < keys.end && entry <= args.page_size_divisor.quotient(keys.end - 1)) {
    ptx::prefetch_l2(sequence.page_row + entry);
  }
}

// One CTA's part of a row tile. What the loop does not need is read again after it, from shared
// memory: registers are for keys and values on the way.
template <class Config>
__device__ __forceinline__ void decode_part(const PagedAttentionArgs& args,
                                            PagedDecodeStorage<Config>& smem) {
  using Element = typename Config::Element;
  const DecodePart& part = smem.schedule.part();
  const Sequence sequence(args, part.seq_idx);
  const DecodeTile<Config> tile(args, sequence, smem.row_tile);
  if (part.begin == part.end || tile.empty()) return;
  if (part.num_parts > 1 && part.idx == 0 && threadIdx.x == 0) {
    PartialResults<Config>(args, part, smem.row_tile).open();
  }
  if (args.alibi_slopes != nullptr) {
    if (threadIdx.x < Config::kRows) {
      const int row = min(tile.first_row + static_cast<int>(threadIdx.x), tile.num_rows - 1);
      smem.alibi[threadIdx.x] = AlibiRow::of(args, sequence, part.kv_head, row);
    }
    __syncthreads();
  }
  {
    const KeyRange seen = sequence.seen_keys(args);
    const auto num_keys = static_cast<int>(
        min(int64_t{part.end} * Config::kBlockKeys, int64_t{seen.end} - seen.begin));
    const KeyRange keys{max(seen.begin + part.begin * Config::kBlockKeys, tile.keys.begin),
                        min(seen.begin + num_keys, tile.keys.end)};
    prefetch_page_row(args, sequence, keys);
    PagedDecode<Config> decode(args, sequence, tile, part.kv_head, smem.alibi);
    decode.run(keys);
    decode.store(smem);
  }
  __syncthreads();

  const bool whole = part.num_parts == 1;
  const PartialResults<Config> partial(args, part, smem.row_tile);
  const int num_rows = min(tile.num_rows - tile.first_row, Config::kRows);
  const int dim_quads = static_cast<int>(args.head_dim) / 4;
  for (int i = threadIdx.x; i < num_rows * dim_quads; i += Config::kThreads) {
    const int row = i / dim_quads, dim = i % dim_quads * 4;
    SoftmaxRow total;
    float4 value = merge_warps(smem, row, dim, total);
    if (whole) {
      const OutputRow out_row(args, sequence, part.kv_head, tile.first_row + row);
      const float inverse = total.inverse_sum(sink_score(args, out_row.head));
      value = {value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse};
      store_output<Element>(args, out_row.idx, dim, value);
      if (dim == 0) args.lse[out_row.idx] = total.lse2() * kLn2;
    } else {
      const int64_t partial_row = partial.row(part.idx, row);
      *reinterpret_cast<float4*>(args.partial_out + partial_row * args.head_dim + dim) = value;
      if (dim == 0) {
        reinterpret_cast<float2*>(args.partial_softmax)[partial_row] = {total.maximum, total.sum};
      }
    }
  }
  if (whole) return;

  __syncthreads();
  if (threadIdx.x == 0) smem.is_last = partial.arrive_last();
  __syncthreads();
  if (!smem.is_last) return;
  for (int row = threadIdx.x / 32; row < num_rows; row += Config::kWarps) {
    partial.merge(row, OutputRow(args, sequence, part.kv_head, tile.first_row + row));
  }
}

// Clears the tokens that have no row tile: those that no CTA computes, and all of sequences without
// a visible key. These are dealt out to the CTAs one by one.
template <class Element>
__device__ __forceinline__ void clear_keyless_tokens(const PagedAttentionArgs& args) {
  for (int64_t seq_idx = blockIdx.x; seq_idx < args.num_seqs; seq_idx += gridDim.x) {
    const Sequence sequence(args, static_cast<int>(seq_idx));
    const KeyRange seen = sequence.seen_keys(args);
    const bool keyless = seen.begin == seen.end;
    const bool all_owned = sequence.first_token + sequence.num_queries == sequence.end_token &&
                           (seq_idx > 0 || sequence.first_token == 0) &&
                           (seq_idx + 1 < args.num_seqs || sequence.end_token == args.num_tokens);
    if (!keyless && all_owned) continue;
    for (int kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
      clear_unowned_tokens<Element>(args, sequence, static_cast<int>(seq_idx), kv_head);
      if (keyless) {
        clear_tokens<Element>(args, sequence.first_token,
                              sequence.first_token + sequence.num_queries, kv_head);
      }
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    paged_decode_kernel(const __grid_constant__ PagedAttentionArgs args) {
  __shared__ PagedDecodeStorage<Config> smem;
  prefetch_tables<Config>(args);
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  if (threadIdx.x < 32) {
    const auto num_row_tiles = static_cast<unsigned>(args.num_row_tiles);
    DecodeSchedule<Config> schedule;
    schedule.start(args, static_cast<int>(blockIdx.x / num_row_tiles));
    if (threadIdx.x == 0) {
      smem.schedule = schedule;
      smem.row_tile = static_cast<int>(blockIdx.x % num_row_tiles);
    }
  }
  clear_keyless_tokens<typename Config::Element>(args);  // by the other warps in the meantime
  __syncthreads();
  while (smem.schedule.valid()) {
    decode_part(args, smem);
    __syncthreads();  // all have done with shared memory
    if (threadIdx.x < 32) {
      DecodeSchedule<Config> schedule = smem.schedule;
      schedule.advance(args);
      __syncwarp();
      if (threadIdx.x == 0) smem.schedule = schedule;
    }
    __syncthreads();
  }
}

// `args` has num_row_tiles and all that is of the decode kernel.
template <class Config>
void launch_paged_decode(const PagedAttentionArgs& args, cudaStream_t stream) {
  const auto ctas = static_cast<unsigned>(args.num_shares * args.num_row_tiles);
  const Launch launch{"paged_attention", dim3(ctas), dim3(Config::kThreads), 0, stream, 1,
                      args.early_start};
  launch(paged_decode_kernel<Config>, args);
}

}  // namespace effllm
