// The two products of a tile of rows with a tile of keys, S = Q K^T and O += P V, of operands in
// shared memory: on Hopper by wgmma, elsewhere by mma.sync.
//
//   wgmma       a warpgroup has 64 rows: it reads K and V once for them, as they lie
//   mma.sync    each warp has its 16 rows of them, and reads all K and V by ldmatrix
//
// Either way warp w owns rows 16 w .. of each 64, and lane (g, c) = (lane / 4, lane % 4) of S and O
// (g, 8 j + 2 c) (g, 8 j + 2 c + 1) (g + 8, 8 j + 2 c) (g + 8, 8 j + 2 c + 1).
#pragma once

#include <cstdint>

#include "attention/paged_row_tile_storage.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace effllm {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // code for 90a
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

template <class Config>
struct PagedTileProducts {
  using Element = typename Config::Element;
  using Storage = PagedRowTileStorage<Config>;
  using QueryTile = typename Storage::QueryTile;
  using KeyTile = typename Storage::KeyTile;
  static constexpr int kRowTiles = Config::kRowTiles;  // of 64 rows, 16 of each warp
  static constexpr int kKeyTiles = Config::kBlockN / 8;
  static constexpr int kDimTiles = Config::kHeadDim / 8;
  static constexpr int kKeySteps = Config::kBlockN / 16;
  static constexpr int kDimSteps = Config::kHeadDim / 16;
  using Scores = float[kRowTiles][kKeyTiles][4];
  using Output = float[kRowTiles][kDimTiles][4];

  // Before the barrier behind which others multiply what this thread has written.
  static __device__ __forceinline__ void publish() {
    if constexpr (kHasWgmma) ptx::fence_async_proxy();
  }

  // All warps call; `has_rows`: whether this one's results are used.
  static __device__ __forceinline__ void scores(Scores& scores, const QueryTile& queries,
                                                const KeyTile& keys, bool has_rows) {
    if constexpr (kHasWgmma) {
      constexpr int kQueryPanel = sizeof(queries[0]), kKeyPanel = sizeof(keys[0]);
      const uint64_t q = ptx::wgmma_descriptor(ptx::smem_address(queries));
      const uint64_t k = ptx::wgmma_descriptor(ptx::smem_address(keys));
      ptx::wgmma_fence();
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
        for (int step = 0; step < kDimSteps; ++step) {
          const int panel = step / kPanelSteps, within = step % kPanelSteps * 32;
          ptx::Wgmma<Element, Config::kBlockN>::mma(
              flat(scores[row_tile]),
              ptx::advance_descriptor(q, panel * kQueryPanel + row_tile * 64 * 128 + within),
              ptx::advance_descriptor(k, panel * kKeyPanel + within), step > 0);
        }
      }
      wait(scores);
    } else if (has_rows) {
#pragma unroll
      for (auto& of_row_tile : scores) {
#pragma unroll
        for (auto& tile : of_row_tile) tile[0] = tile[1] = tile[2] = tile[3] = 0.f;
      }
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
        uint32_t q[kRowTiles][4];
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
          const int first_row = row_tile * 64 + thread_in_team<Config>() / 32 * 16;
          ptx::ldmatrix_x4(q[row_tile], block_row(queries, first_row, step));
        }
#pragma unroll
        for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
          // As B fragments: left and right half of keys 0-7 of the pair, then of keys 8-15.
          const int lane_idx = threadIdx.x % 32;
          const int key = pair * 16 + lane_idx / 16 * 8 + lane_idx % 8;
          uint32_t k[4];
          ptx::ldmatrix_x4(k, &chunk_of(keys, key, step * 2 + lane_idx / 8 % 2));
#pragma unroll
          for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
            auto& s = scores[row_tile];
            ptx::mma_m16n8k16<Element>(s[pair * 2], q[row_tile], k[0], k[1]);
            ptx::mma_m16n8k16<Element>(s[pair * 2 + 1], q[row_tile], k[2], k[3]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void accumulate(Output& output, const Scores& weights,
                                                    const KeyTile& values, bool has_rows) {
    // Two accumulator tiles side by side are one A fragment.
    uint32_t p[kRowTiles][kKeySteps][4];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int step = 0; step < kKeySteps; ++step) {
        const auto& left = weights[row_tile][step * 2];
        const auto& right = weights[row_tile][step * 2 + 1];
        uint32_t (&a)[4] = p[row_tile][step];
        a[0] = ptx::pack_pair<Element>(left[0], left[1]);
        a[1] = ptx::pack_pair<Element>(left[2], left[3]);
        a[2] = ptx::pack_pair<Element>(right[0], right[1]);
        a[3] = ptx::pack_pair<Element>(right[2], right[3]);
      }
    }
    if constexpr (kHasWgmma) {
      const uint64_t v = ptx::wgmma_mn_descriptor(ptx::smem_address(values), sizeof(values[0]));
      pin(output);
#pragma unroll
      for (auto& of_row_tile : p) {
#pragma unroll
        for (auto& a : of_row_tile) ptx::pin_operand(a);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
          ptx::Wgmma<Element, Config::kHeadDim>::mma_mn_major(
              flat(output[row_tile]), p[row_tile][step],
              ptx::advance_descriptor(v, step * 16 * 128), true);
        }
      }
      wait(output);
    } else if (has_rows) {
#pragma unroll
      for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
        for (int pair = 0; pair < kDimTiles / 2; ++pair) {
          uint32_t v[4];
          ptx::ldmatrix_x4_trans(v, block_row(values, step * 16, pair));
#pragma unroll
          for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
            auto& o = output[row_tile];
            ptx::mma_m16n8k16<Element>(o[pair * 2], p[row_tile][step], v[0], v[1]);
            ptx::mma_m16n8k16<Element>(o[pair * 2 + 1], p[row_tile][step], v[2], v[3]);
          }
        }
      }
    }
  }

 private:
  static constexpr int kPanelSteps = 4;  // of 16 dims, in 128 bytes

  template <int kTiles>
  static __device__ __forceinline__ float (&flat(float (&tiles)[kTiles][4]))
      [kTiles * 4] { return reinterpret_cast<float (&)[kTiles * 4]>(tiles); }

  template <int kTiles>
  static __device__ __forceinline__ void pin(float (&sums)[kRowTiles][kTiles][4]) {
#pragma unroll
    for (auto& of_row_tile : sums) ptx::pin_accumulators(flat(of_row_tile));
  }

  template <int kTiles>
  static __device__ __forceinline__ void wait(float (&sums)[kRowTiles][kTiles][4]) {
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    pin(sums);
  }

  // What this lane gives to ldmatrix for the 16 x 16 block of chunks 2 chunk_pair and its
  // neighbour: matrices 0 and 1 are its upper and lower left, 2 and 3 its upper and lower right.
  template <class Tile>
  static __device__ __forceinline__ const uint4* block_row(const Tile& tile, int first_row,
                                                           int chunk_pair) {
    const int lane_idx = threadIdx.x % 32;
    return &chunk_of(tile, first_row + lane_idx % 16, chunk_pair * 2 + lane_idx / 16);
  }
};

}  // namespace effllm
