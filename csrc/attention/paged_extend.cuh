// Paged attention for steps of some tokens: trees and chains of drafts, short chunks. Rows of a
// KV head, too many for the fragments of paged_decode_sm80.cuh, fill a tile of the tensor cores;
// keys are split over CTAs all the same.
//
// Roofline: bytes, as in decode: each key costs 4 * D bytes of K and V in 16 bits, read once for 64
// rows. At 3.06 TB/s a multiprocessor of an H100 has 32 KB, a tile of 64 keys of D = 128, in 1.4
// us; its products take 0.3 us of wgmma, and a warp some 500 instructions beside them. Two teams
// have up to 48 KB each on the way. Parts cost what they leave, 33 KB of fp32, and the time until
// others have read that: so a part is of several teams, which meet in shared memory (on Hopper).
//
//   a tile of rows x the keys of a pair (sequence, KV head)
//
//          part 0: a cluster           part 1                 decode_split.cuh
//          CTA 0        CTA 1          CTA 0        CTA 1
//          team  team   team  team     team  team   team  team
//            0     1      0     1        0     1      0     1  paged_row_tile.cuh
//   row r  [oms]-[oms]--[oms]-[oms]    [oms]-[oms]--[oms]-[oms]  o, m, s in shared memory
//                     |                           |           a warp of CTA r % 2 merges
//                   [oms]----------+------------[oms]         in memory
//                                  |                          who is last merges: combine.cuh
//                              out, lse
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/combine.cuh"
#include "attention/decode_share.cuh"
#include "attention/paged_row_tile.cuh"
#include "cuda/launch.h"
#include "ptx/cluster.cuh"

namespace effllm {

template <class Element, int kHeadDim, class Kv = Element>
struct PagedExtendConfig : PagedRowTileConfig<Element, kHeadDim, Kv, 1> {
  using Base = PagedRowTileConfig<Element, kHeadDim, Kv, 1>;
  static constexpr bool kTrees = true;
  static constexpr bool kRunsOnce = true;  // so that it looks up keys before it needs queries
  static constexpr bool kScores = false;
  using LoadLengths = LoadCached;
  using LoadLengthsPastL1 = LoadPastL1;
  static constexpr int kRows = Base::kBlockM;
  // Two where shared memory has room: of D = 256 not on every GPU; codes are in registers.
  static constexpr int kStages = Base::kQuantized || kHeadDim == 256 ? 1 : 2;
  // As registers allow, and shared memory: of one CTA, or of as many.
  static constexpr int kTeamsPerSm =
      kHeadDim == 64 || (kHeadDim == 128 && Base::kQuantized) ? 3 : 2;
  static constexpr int kMaxTeams = kTeamsPerSm;
  static constexpr int kMaxCluster = kMaxClusterCtas;
  // What shares are made of: see PagedDecodeConfig. Of a cluster's part a team has few blocks.
  static constexpr int kBlockKeys = 64;
  static constexpr int kMinBlocks = 256 / kBlockKeys;
  static constexpr int kUnsplitBlocks = 512 / kBlockKeys;
  static constexpr int kStartBlocks = 128 / kBlockKeys;
};

// What a warp adds up for its rows: four neighbouring outputs of row 0 of the tile, first of all of
// them, and what those of its rows count.
struct alignas(16) MergeSource {
  static constexpr int kRows = 4, kMany = 16;
  const float4* outputs;
  float weights[kRows];
};

// Beside the tiles of its teams.
template <class Config>
struct PagedExtendStorage {
  static constexpr int kMaxWarps = Config::kMaxTeams * Config::kTileThreads / 32;
  float2 softmax[Config::kMaxTeams][Config::kRows];  // maximum and sum beside output_quad
  MergeSource sources[kMaxWarps][MergeSource::kMany];
  DecodeShare<Config> share;
  bool is_last;
};

// Merges what the CTAs of a cluster have of the rows of a tile, and then what clusters have of
// them: the same, with sources elsewhere. All warps of the cluster have as many rows, four at a
// time: eight lanes find the weights of a row's sources, then all add up its outputs.
//
// It runs once a part, with its code fetched from memory and every load waited for: what counts is
// how few instructions there are, and how many loads are on the way together.
template <class Config>
class ExtendMerge {
  static constexpr int kRows = MergeSource::kRows;
  static constexpr int kLoads = Config::kMaxTeams > 2 ? 2 : 4;  // of each row, as registers allow
  static constexpr int kLanes = 32 / kRows;                     // of a row

 public:
  __device__ __forceinline__ ExtendMerge(const PagedAttentionArgs& args,
                                         PagedExtendStorage<Config>& smem,
                                         PagedRowTileStorage<Config>& of_cta,
                                         const Sequence& sequence, int kv_head,
                                         const DecodeTile<Config>& tile)
      : args_(args),
        smem_(smem),
        of_cta_(of_cta),
        sequence_(sequence),
        partial_(args, smem.share.schedule.part(), smem.share.row_tile, ptx::cluster_rank()),
        kv_head_(kv_head),
        first_row_(tile.first_row),
        tile_rows_(min(tile.num_rows - tile.first_row, Config::kRows)),
        num_quads_(static_cast<int>(args.head_dim) / 4),
        warp_idx_(static_cast<int>(threadIdx.x / 32)),
        lane_idx_(static_cast<int>(threadIdx.x % 32)) {}

  // All teams of the cluster have left what they have; is_last is false.
  __device__ __forceinline__ void run() {
    const int num_parts = smem_.share.schedule.part().num_parts;
    const auto num_ctas = static_cast<int>(ptx::cluster_size());
    const auto rank = static_cast<int>(ptx::cluster_rank());
    row_step_ = static_cast<int>(blockDim.x / 32) * num_ctas;
#pragma unroll 1
    while (true) {
      in_memory_ = smem_.is_last;  // the compiler cannot know: one copy of the code
      is_result_ = in_memory_ || num_parts == 1;
      num_sources_ = in_memory_ ? num_parts : num_ctas;
#pragma unroll 1
      for (int row = warp_idx_ * num_ctas + rank; row < tile_rows_; row += kRows * row_step_) {
        merge(row);
      }
      if (in_memory_) return;
      __syncwarp();
      ptx::cluster_arrive_relaxed();  // the warp has all that it wants of others
      if (!is_result_) {
        __syncthreads();
        if (threadIdx.x == 0) smem_.is_last = partial_.arrive_last();
        __syncthreads();
      }
      ptx::cluster_wait();
      if (!smem_.is_last) return;
    }
  }

 private:
  // Where a source has row 0 of the tile.
  __device__ __forceinline__ float4* outputs_of(int source) const {
    if (in_memory_) return part_outputs(source);
    return ptx::cluster_peer(&of_cta_.output_quad(0, 0, 0), source);
  }
  __device__ __forceinline__ float2* softmax_of(int source) const {
    return in_memory_ ? part_softmax(source) : ptx::cluster_peer(smem_.softmax[0], source);
  }
  __device__ __forceinline__ float4* part_outputs(int idx) const {
    return reinterpret_cast<float4*>(args_.partial_out + partial_.row(idx, 0) * args_.head_dim);
  }
  __device__ __forceinline__ float2* part_softmax(int idx) const {
    return reinterpret_cast<float2*>(args_.partial_softmax) + partial_.row(idx, 0);
  }

  // Rows first_row, first_row + row_step_, ..: their softmax by kLanes lanes each, their outputs by
  // all. Rows past the last go along with it.
  __device__ __forceinline__ void merge(int first_row) const {
    const int lane_row = min(first_row + lane_idx_ / kLanes * row_step_, tile_rows_ - 1);
    const SoftmaxRow total = merge_softmax(lane_row);
    const bool is_first = lane_idx_ % kLanes == 0;
    float factor = 1.f;
    if (is_result_) {
      const OutputRow out_row(args_, sequence_, kv_head_, first_row_ + lane_row);
      factor = total.inverse_sum(sink_score(args_, out_row.head));
      if (is_first) args_.lse[out_row.idx] = total.lse2() * kLn2;
    } else if (is_first) {
      part_softmax(smem_.share.schedule.part().idx)[lane_row] = {total.maximum, total.sum};
    }
#pragma unroll 1
    for (int first_quad = 0; first_quad < num_quads_; first_quad += 32) {
      float4 sums[kRows] = {};
#pragma unroll 1
      for (int first = 0; first < num_sources_; first += MergeSource::kMany) {
        const int count = min(num_sources_ - first, MergeSource::kMany);
        __syncwarp();  // all are done with the sources before
#pragma unroll 1
        for (int i = lane_idx_ % kLanes; i < count; i += kLanes) {
          MergeSource& source = smem_.sources[warp_idx_][i];
          const float maximum = softmax_of(first + i)[lane_row].x;
          source.weights[lane_idx_ / kLanes] = factor * ptx::exp2_approx(maximum - total.maximum);
          source.outputs = outputs_of(first + i);
        }
        __syncwarp();
        add_outputs(sums, count, first_row, min(first_quad + lane_idx_, num_quads_ - 1));
      }
      if (first_quad + lane_idx_ < num_quads_) store(sums, first_row, first_quad + lane_idx_);
    }
  }

  __device__ __forceinline__ SoftmaxRow merge_softmax(int row) const {
    SoftmaxRow total;
#pragma unroll 1
    for (int i = lane_idx_ % kLanes; i < num_sources_; i += kLanes) {
      const float2 softmax = softmax_of(i)[row];
      const float larger = fmaxf(total.maximum, softmax.x);
      total.sum = total.sum * ptx::exp2_approx(total.maximum - larger) +
                  softmax.y * ptx::exp2_approx(softmax.x - larger);
      total.maximum = larger;
    }
    const float of_lane = total.maximum;
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      total.maximum = fmaxf(total.maximum, __shfl_xor_sync(~0u, total.maximum, lanes));
    }
    total.sum *= ptx::exp2_approx(of_lane - total.maximum);
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      total.sum += __shfl_xor_sync(~0u, total.sum, lanes);
    }
    return total;
  }

  __device__ __forceinline__ void add_outputs(float4 (&sums)[kRows], int num_sources, int first_row,
                                              int quad) const {
    const MergeSource* const sources = smem_.sources[warp_idx_];
    int places[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first_row + i * row_step_;
      places[i] =
          in_memory_ ? row * num_quads_ + quad : row * (Config::kHeadDim / 4) + (quad ^ row % 8);
    }
#pragma unroll 1
    for (int source = 0; source < num_sources; source += kLoads) {
      float4 outputs[kLoads][kRows];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const float4* const of_source = sources[min(source + j, num_sources - 1)].outputs;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const bool is_row = first_row + i * row_step_ < tile_rows_;
          outputs[j][i] = is_row ? of_source[places[i]] : float4{};
        }
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (source + j >= num_sources) break;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float weight = sources[source + j].weights[i];
          sums[i].x += weight * outputs[j][i].x;
          sums[i].y += weight * outputs[j][i].y;
          sums[i].z += weight * outputs[j][i].z;
          sums[i].w += weight * outputs[j][i].w;
        }
      }
    }
  }

  __device__ __forceinline__ void store(const float4 (&sums)[kRows], int first_row,
                                        int quad) const {
    float4* const of_part = part_outputs(smem_.share.schedule.part().idx);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first_row + i * row_step_;
      if (row >= tile_rows_) break;
      if (is_result_) {
        const OutputRow out_row(args_, sequence_, kv_head_, first_row_ + row);
        store_output<typename Config::Element>(args_, out_row.idx, quad * 4, sums[i]);
      } else {
        of_part[row * num_quads_ + quad] = sums[i];
      }
    }
  }

  const PagedAttentionArgs& args_;
  PagedExtendStorage<Config>& smem_;
  PagedRowTileStorage<Config>& of_cta_;
  const Sequence& sequence_;
  const PartialResults<Config> partial_;
  const int kv_head_, first_row_, tile_rows_, num_quads_;
  const int warp_idx_, lane_idx_;
  int row_step_;  // from one of the warp's rows to the next
  // Of what is merged.
  bool in_memory_, is_result_;
  int num_sources_;
};

// One cluster's part of a row tile.
template <class Config>
__device__ __forceinline__ void extend_part(const PagedAttentionArgs& args,
                                            PagedExtendStorage<Config>& smem,
                                            PagedRowTileStorage<Config>* tiles) {
  const DecodePart& part = smem.share.schedule.part();
  const Sequence sequence(args, part.table_idx);
  const DecodeTile<Config> rows(args, sequence, smem.share.row_tile);
  if (part.begin == part.end || rows.empty()) return;
  const int kv_head = sequence.first_kv_head + part.head;
  if (threadIdx.x == 0) {
    smem.is_last = false;
    if (part.num_parts > 1 && part.idx == 0) {
      PartialResults<Config>(args, part, smem.share.row_tile, ptx::cluster_rank()).open();
    }
  }
  {
    const int team = team_idx<Config>();
    PagedRowTile<Config> tile(args, tiles[team], sequence, kv_head, rows.first_row);
    tile.run(keys_of_team<Config>(
        keys_of_part<Config>(args, sequence.seen_keys(args), part, rows.keys), team));
    tile.leave(tiles, smem.softmax);
  }
  ptx::cluster_sync();
  ExtendMerge<Config>(args, smem, tiles[0], sequence, kv_head, rows).run();
}

template <class Config>
__global__ void __launch_bounds__(Config::kTileThreads* Config::kMaxTeams, 1)
    paged_extend_kernel(const __grid_constant__ PagedAttentionArgs args) {
  extern __shared__ __align__(1024) uint4 smem_raw[];
  __shared__ PagedExtendStorage<Config> smem;
  auto* const tiles = reinterpret_cast<PagedRowTileStorage<Config>*>(smem_raw);
  for_each_part<Config>(args, smem.share, [&] { extend_part(args, smem, tiles); });
}

}  // namespace effllm
