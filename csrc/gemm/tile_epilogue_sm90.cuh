// How a tile of a persistent wgmma GEMM gets from the accumulators into the output [M, N].
//
// The tile is C::kRows rows of W (consecutive in a row of the output) by C::kTokens tokens; each of
// two warpgroups holds C::kRowBlocks blocks of 64 rows. Writes M * N values once.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "gemm/packed_gemm.h"
#include "gemm/tile_schedule.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cvt.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/tma.cuh"

namespace effllm {

inline constexpr int kMathGroups = 2;
inline constexpr int kMathThreads = 128 * kMathGroups;
inline constexpr int kMathBarrier = 1;  // named barriers: of all math warps, then of each group

// Tokens' rows of sums are 4 floats off a multiple of 32: a warp's stores fall into 32 banks.
inline constexpr int kSumPadding = 4;
constexpr int split_sums_bytes(int tokens, int rows) { return tokens * (rows + kSumPadding) * 4; }

template <class C>
using Accumulators = float[C::kRowBlocks][C::kTokens / 2];

// A whole tile: adds the bias, rounds, and leaves it to TMA, which one thread of each warpgroup
// starts. Its box is a strip of C::kOutTokens tokens, [token][row], under the 128-byte swizzle; a
// tile of more tokens goes out in turns. Params have n and a bias.
template <class C, class Params>
__device__ __forceinline__ void store_tile(const Params& params, const CUtensorMap& out_map,
                                           uint8_t* out_smem, const TileSchedule::Work& work,
                                           const Accumulators<C>& sums) {
  using InT = typename C::InT;
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int first_strip = group * C::kRowBlocks;
  const int first_row = work.row_tile * C::kRows + first_strip * kInt4StripRows;
  const auto row_bias = [&](int row) {
    if (params.bias == nullptr || row >= params.n) return 0.0f;
    return device_load_float(params.bias, params.bias_dtype, row * params.stride_bias);
  };
  float bias[C::kRowBlocks][2];
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) {
    const int row = first_row + block * kInt4StripRows + warp * 16 + lane / 4;
    bias[block][0] = row_bias(row), bias[block][1] = row_bias(row + 8);
  }
#pragma unroll
  for (int first = 0; first < C::kTokens; first += C::kOutTokens) {
    if (first > 0 && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
    ptx::named_barrier_sync<128>(kMathBarrier + 1 + group);  // what was there has been read
#pragma unroll
    for (int block = 0; block < C::kRowBlocks; ++block) {
      // Lane i points at a token's 16 bytes of 8 rows: tokens i % 8 and, for i >= 16, those 8 on.
      const int chunk = 2 * warp + lane / 8 % 2;
      uint8_t* out = out_smem + (first_strip + block) * C::kOutStripBytes +
                     (lane / 16 * 8 + lane % 8) * 128 + ((chunk ^ (lane % 8)) << 4);
#pragma unroll
      for (int i = 0; i < C::kOutTokens / 16; ++i) {
        const float* sum = &sums[block][first / 2 + 8 * i];
        uint32_t matrices[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float row = bias[block][j % 2];
          matrices[j] = ptx::pack_pair<InT>(sum[2 * j] + row, sum[2 * j + 1] + row);
        }
        ptx::stmatrix_x4_trans(out + i * 16 * 128, matrices);
      }
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync<128>(kMathBarrier + 1 + group);
    if (threadIdx.x % 128 == 0) {
#pragma unroll
      for (int block = 0; block < C::kRowBlocks; ++block) {
        const int row = first_row + block * kInt4StripRows;
        if (row < params.n) {
          ptx::tma_store_2d(&out_map, out_smem + (first_strip + block) * C::kOutStripBytes, row,
                            work.token_tile * C::kTokens + first);
        }
      }
      ptx::bulk_commit();
    }
  }
}

// A tile of which this CTA has one slice: leaves its sums where the cluster can read them, then
// adds those of all slices, in order, for its share of the tokens.
template <class C>
__device__ __forceinline__ void store_split_tile(const PackedGemmParams& params, uint8_t* ring_smem,
                                                 const TileSchedule& schedule,
                                                 const TileSchedule::Work& work,
                                                 const Accumulators<C>& sums) {
  auto* const sums_smem = reinterpret_cast<float*>(ring_smem);
  constexpr int kStride = C::kRows + kSumPadding;
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  ptx::named_barrier_sync<kMathThreads>(kMathBarrier);  // the ring has been read by all
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) {
    const int row = (group * C::kRowBlocks + block) * kInt4StripRows + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < C::kTokens / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums_smem[token * kStride + row + i / 2 % 2 * 8] = sums[block][i];
    }
  }
  ptx::fence_async_proxy();  // the ring will be filled again
  ptx::cluster_sync();
  const int slices = schedule.slices;
  const int first_row = work.row_tile * C::kRows, first_token = work.token_tile * C::kTokens;
  const int tokens = min(static_cast<int>(params.m) - first_token, C::kTokens);
  constexpr int kQuads = C::kRows / 4;
  const int first = static_cast<int>(threadIdx.x + blockIdx.x % slices * kMathThreads);
  for (int i = first; i < tokens * kQuads; i += slices * kMathThreads) {
    const int token = i / kQuads, n = first_row + i % kQuads * 4;
    if (n >= params.n) continue;
    const auto* own = reinterpret_cast<const float4*>(sums_smem + token * kStride) + i % kQuads;
    float4 parts[kMaxClusterCtas];
#pragma unroll
    for (int rank = 0; rank < kMaxClusterCtas; ++rank) {
      if (rank < slices) parts[rank] = ptx::load_cluster_smem(own, rank);
    }
    float sum[4] = {};
#pragma unroll
    for (int rank = 0; rank < kMaxClusterCtas; ++rank) {
      if (rank < slices) {
        sum[0] += parts[rank].x, sum[1] += parts[rank].y;
        sum[2] += parts[rank].z, sum[3] += parts[rank].w;
      }
    }
    if (params.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] += device_load_float(params.bias, params.bias_dtype, (n + j) * params.stride_bias);
      }
    }
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(params.out) +
                              (first_token + token) * params.n +
                              n) = {ptx::pack_pair<typename C::InT>(sum[0], sum[1]),
                                    ptx::pack_pair<typename C::InT>(sum[2], sum[3])};
  }
  ptx::cluster_sync_relaxed();  // nobody overwrites, or leaves with, what others still read
}

}  // namespace effllm
