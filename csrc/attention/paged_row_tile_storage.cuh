// What kernels with tiles of rows are compiled for, and the shared memory of a tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "attention/alibi.cuh"
#include "attention/tree_row.cuh"
#include "ptx/barrier.cuh"

namespace effllm {

// kHeadDim is D rounded up to what is compiled; loads past D give zeros, the scale is that of D.
// `Kv_` is the cache's element, or the codec of a quantised one.
template <class Element_, int kHeadDim_, class Kv_, int kRowTiles_>
struct PagedRowTileConfig {
  using Element = Element_;
  using Kv = Kv_;
  static constexpr bool kQuantized = !std::is_same_v<Element, Kv>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;  // of 64 rows, 16 of each warp
  // The output of D = 256 leaves registers for 32 keys.
  static constexpr int kBlockN = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kWarps = 4;
  static constexpr int kBlockM = kRowTiles * kWarps * 16;
  static constexpr int kTileThreads = kWarps * 32;
  static constexpr int kChunks = kHeadDim / 8;
  static_assert(kHeadDim % 64 == 0, "rows must be multiples of 128 bytes for the swizzle");
};

// A CTA may have up to kMaxTeams tiles, of a team of threads each, which wait for one another
// alone.
template <class Config>
__device__ __forceinline__ int num_teams() {
  return Config::kMaxTeams == 1 ? 1 : static_cast<int>(blockDim.x) / Config::kTileThreads;
}
template <class Config>
__device__ __forceinline__ int team_idx() {
  return Config::kMaxTeams == 1 ? 0 : static_cast<int>(threadIdx.x) / Config::kTileThreads;
}
template <class Config>
__device__ __forceinline__ int thread_in_team() {
  return static_cast<int>(threadIdx.x) - team_idx<Config>() * Config::kTileThreads;
}
template <class Config>
__device__ __forceinline__ void sync_team() {
  if constexpr (Config::kMaxTeams == 1) {
    __syncthreads();
  } else {
    ptx::named_barrier_sync<Config::kTileThreads>(1 + team_idx<Config>());
  }
}

// Aligned as the swizzle wants it.
template <class Config>
struct alignas(1024) PagedRowTileStorage {
  using QueryTile = uint4[Config::kChunks / 8][Config::kBlockM][8];
  using KeyTile = uint4[Config::kChunks / 8][Config::kBlockN][8];

  QueryTile q;  // the output in the end
  KeyTile k[Config::kStages];
  KeyTile v[Config::kStages];
  // Of the tiles that are there or on their way, and the next one to be asked for: where the keys'
  // rows begin, null past the last.
  static constexpr int kSlots = Config::kStages + 1;
  const char* k_row[kSlots][Config::kBlockN];
  const char* v_row[kSlots][Config::kBlockN];
  // Their words, of quantised caches: see quant/kv_layout.h.
  static constexpr int kNumWords = Config::kQuantized ? Config::kBlockN : 1;
  uint32_t k_word[kSlots][kNumWords];
  uint32_t v_word[kSlots][kNumWords];

  // Of each row.
  float sink[Config::kBlockM];                         // kMaskedScore without sinks
  AlibiRow alibi[Config::kBlockM];                     // unless there are no slopes
  TreeRow tree[Config::kTrees ? Config::kBlockM : 1];  // unless there is no tree

  static __device__ __forceinline__ int slot(int tile) { return tile % kSlots; }

  // In the place of queries, keys and values, when all are done with these: four neighbouring sums
  // of a row's output, so that eight rows, and a row's neighbours, hit different banks.
  static_assert(Config::kRowTiles > 1 ||
                sizeof(float[Config::kBlockM][Config::kHeadDim]) <=
                    sizeof(QueryTile) + Config::kStages * 2 * sizeof(KeyTile));
  __device__ __forceinline__ float4& output_quad(int row, int first_quad, int quad) {
    auto* const quads = reinterpret_cast<float4*>(q) + row * (Config::kHeadDim / 4);
    return quads[first_quad + (quad ^ row % 8)];
  }
  // Or this thread's four sums of the mma tile of 8 dims.
  __device__ __forceinline__ float4& output_fragment(int dim_tile) {
    return reinterpret_cast<float4*>(q)[dim_tile * Config::kTileThreads + thread_in_team<Config>()];
  }
};

// Rows lie in panels of 128 bytes, eight chunks of 16, and chunk c of row r at c ^ (r % 8) of them:
// the eight rows of an ldmatrix hit all banks, and wgmma knows this order.
template <int kPanels, int kRows>
__device__ __forceinline__ uint4& chunk_of(uint4 (&tile)[kPanels][kRows][8], int row, int chunk) {
  return tile[chunk / 8][row][(chunk ^ row) % 8];
}
template <int kPanels, int kRows>
__device__ __forceinline__ const uint4& chunk_of(const uint4 (&tile)[kPanels][kRows][8], int row,
                                                 int chunk) {
  return tile[chunk / 8][row][(chunk ^ row) % 8];
}

}  // namespace effllm
