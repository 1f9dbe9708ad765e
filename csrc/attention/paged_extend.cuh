// Paged attention for steps of some tokens: trees and chains of drafts, short chunks. Rows of a
// KV head, too many for the fragments of paged_decode_sm80.cuh, fill a tile of the tensor cores;
// keys are split over CTAs all the same.
//
// Roofline: bytes, as in decode: each key costs 4 * D bytes of K and V in 16 bits, read once for 64
// rows. At 3.06 TB/s a multiprocessor of an H100 has 32 KB, a tile of 64 keys of D = 128, in 1.4
// us; its products take 0.3 us of wgmma, and a warp some 500 instructions beside them. Two CTAs
// have up to 48 KB each on the way. Parts cost what they leave: 33 KB of fp32, written and read.
//
//   a tile of rows x the keys of a pair (sequence, KV head)
//
//             part 0      part 1      part 2         a CTA each (decode_split.cuh); what it does
//   rows    [ o, m, s | o, m, s     | o, m, s ]      with its rows, paged_row_tile.cuh
//                  \        |        /
//   row r            out[r], lse[r]                  a warp each, in a second kernel: the rows of a
//                                                    pair are too many for one CTA to merge
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/combine.cuh"
#include "attention/decode_share.cuh"
#include "attention/paged_row_tile.cuh"
#include "cuda/launch.h"
#include "ptx/grid.cuh"

namespace effllm {

template <class Element, int kHeadDim, class Kv = Element>
struct PagedExtendConfig : PagedRowTileConfig<Element, kHeadDim, Kv, 1> {
  using Base = PagedRowTileConfig<Element, kHeadDim, Kv, 1>;
  static constexpr bool kTrees = true;
  static constexpr bool kScores = false;
  using LoadLengths = LoadCached;
  using LoadLengthsPastL1 = LoadPastL1;
  static constexpr int kRows = Base::kBlockM;
  // Two where shared memory has room: of D = 256 not on every GPU; codes are in registers.
  static constexpr int kStages = Base::kQuantized || kHeadDim == 256 ? 1 : 2;
  // As registers allow, and shared memory.
  static constexpr int kCtasPerSm = kHeadDim == 64 || (kHeadDim == 128 && Base::kQuantized) ? 3 : 2;
  // What shares are made of: see PagedDecodeConfig.
  static constexpr int kBlockKeys = 64;
  static constexpr int kMinBlocks = 128 / kBlockKeys;
  static constexpr int kUnsplitBlocks = 384 / kBlockKeys;
  static constexpr int kStartBlocks = 128 / kBlockKeys;
};

template <class Config>
struct PagedExtendStorage {
  PagedRowTileStorage<Config> tile;
  DecodeShare<Config> share;
};

// One CTA's part of a row tile.
template <class Config>
__device__ __forceinline__ void extend_part(const PagedAttentionArgs& args,
                                            PagedExtendStorage<Config>& smem) {
  const DecodePart& part = smem.share.schedule.part();
  const int row_tile = smem.share.row_tile;
  const Sequence sequence(args, part.table_idx);
  const DecodeTile<Config> rows(args, sequence, row_tile);
  if (part.begin == part.end || rows.empty()) return;
  const int kv_head = sequence.first_kv_head + part.head;
  PagedRowTile<Config> tile(args, smem.tile, sequence, kv_head, rows.first_row);
  tile.run(keys_of_part<Config>(args, sequence.seen_keys(args), part, rows.keys));
  if (part.idx == 0 && threadIdx.x == 0) {
    const int64_t pair = int64_t{part.table_idx} * args.heads_per_table + part.head;
    args.pair_parts[pair * args.num_row_tiles + row_tile] =
        make_int2(part.first_slot, part.num_parts);
  }
  if (part.num_parts == 1) {
    tile.store();
  } else {
    const int64_t row = PartialResults<Config>(args, part, row_tile).row(part.idx, 0);
    tile.store_part(args.partial_out + row * args.head_dim,
                    reinterpret_cast<float2*>(args.partial_softmax) + row);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    paged_extend_kernel(const __grid_constant__ PagedAttentionArgs args) {
  extern __shared__ __align__(1024) uint4 smem_raw[];
  auto& smem = *reinterpret_cast<PagedExtendStorage<Config>*>(smem_raw);
  for_each_part<Config>(args, smem.share, [&] { extend_part(args, smem); });
}

inline constexpr int kMergeWarps = 8;

// A row for each warp, if its pair has several parts.
template <class Config>
__global__ void __launch_bounds__(kMergeWarps * 32)
    paged_extend_merge_kernel(const __grid_constant__ PagedAttentionArgs args) {
  constexpr unsigned kCtasPerTile = Config::kRows / kMergeWarps;
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const unsigned tile_idx = blockIdx.x / kCtasPerTile;
  const int2 parts = args.pair_parts[tile_idx];  // asked for together with the lengths
  const auto num_row_tiles = static_cast<unsigned>(args.num_row_tiles);
  const unsigned pair = tile_idx / num_row_tiles;
  const auto row_tile = static_cast<int>(tile_idx % num_row_tiles);
  const auto table_idx = static_cast<int>(pair / static_cast<unsigned>(args.heads_per_table));
  const int head = static_cast<int>(pair) - table_idx * args.heads_per_table;
  const auto row_in_tile =
      static_cast<int>(blockIdx.x % kCtasPerTile * kMergeWarps + threadIdx.x / 32);
  const int row = row_tile * Config::kRows + row_in_tile;
  const Sequence sequence(args, table_idx);
  const bool has_parts = sequence.is_taken(args) && !sequence.seen_keys(args).empty();
  if (!has_parts || row >= sequence.num_queries * args.group || parts.y == 1) return;
  DecodePart part{};
  part.first_slot = parts.x, part.num_parts = parts.y;
  PartialResults<Config>(args, part, row_tile)
      .template merge<8>(row_in_tile,
                         OutputRow(args, sequence, sequence.first_kv_head + head, row));
}

// `args` has num_row_tiles and all that is of kernels that split keys.
template <class Config>
void launch_paged_extend(const PagedAttentionArgs& args, cudaStream_t stream) {
  const auto ctas = static_cast<unsigned>(args.num_shares * args.num_row_tiles);
  const Launch launch{"paged_attention",
                      dim3(ctas),
                      dim3(Config::kThreads),
                      sizeof(PagedExtendStorage<Config>),
                      stream,
                      1,
                      args.early_start};
  launch(paged_extend_kernel<Config>, args);
  const int64_t tiles = args.num_seqs * args.num_kv_heads * args.num_row_tiles;
  const Launch merge{"paged_attention",
                     dim3(static_cast<unsigned>(tiles * (Config::kRows / kMergeWarps))),
                     dim3(kMergeWarps * 32),
                     0,
                     stream,
                     1,
                     args.early_start};
  merge(paged_extend_merge_kernel<Config>, args);
}

}  // namespace effllm
