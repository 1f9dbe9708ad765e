// How a tile of a persistent wgmma GEMM gets from the accumulators into the output [M, N].
//
// The tile is C::kRows rows of A by C::kCols of B; each of two warpgroups holds C::kRowBlocks
// blocks of 64 rows. A is W, its rows consecutive in a row of the output, or, with C::kTokenRows,
// x. Writes M * N values once.
//
// An op brings its `Finish`: what becomes of a sum before it is rounded.
//   m, n, out                      of the output
//   feature(n), token(m)           what it wants to know of a row of W and of a token, types
//                                  Feature and Token; any values will do where there is none
//   apply(sum, feature, token)
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "gemm/tile_schedule.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cvt.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/tma.cuh"

namespace effllm {

inline constexpr int kBlockRows = 64;  // of a wgmma
inline constexpr int kMathGroups = 2;
inline constexpr int kMathThreads = 128 * kMathGroups;
inline constexpr int kMathBarrier = 1;  // named barriers: of all math warps, then of each group

// Columns of sums are 4 floats off a multiple of 32: a warp's stores fall into 32 banks.
inline constexpr int kSumPadding = 4;
constexpr int split_sums_bytes(int cols, int rows) { return cols * (rows + kSumPadding) * 4; }

template <class C>
using Accumulators = float[C::kRowBlocks][C::kCols / 2];

// What a Finish wants to know of a tile, in shared memory before its sums are there: loads at the
// end would have nothing to hide behind. Each warpgroup has its rows and all columns.
template <class C, class Finish>
class TileTerms {
 public:
  using Feature = typename Finish::Feature;
  using Token = typename Finish::Token;
  using Row = std::conditional_t<C::kTokenRows, Token, Feature>;
  using Col = std::conditional_t<C::kTokenRows, Feature, Token>;

  // Between the stores of the tile before and those of this one.
  __device__ __forceinline__ void load(const Finish& finish, const TileSchedule::Work& work) {
    constexpr int kGroupRows = C::kRowBlocks * kBlockRows;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int row = group * kGroupRows + thread, first_col = work.col_tile * C::kCols;
    if (thread < kGroupRows) set(rows_, row, finish, work.row_tile * C::kRows + row);
#pragma unroll
    for (int col = 0; col < C::kCols; col += 128) {
      if (col + thread < C::kCols) {
        set(cols_[group], col + thread, finish, first_col + col + thread);
      }
    }
  }

  __device__ __forceinline__ Row row(int row) const { return get(rows_, row); }
  __device__ __forceinline__ Col col(int col) const { return get(cols_[threadIdx.x / 128], col); }

  __device__ __forceinline__ float apply(const Finish& finish, float sum, Row row, Col col) const {
    if constexpr (C::kTokenRows) {
      return finish.apply(sum, col, row);
    } else {
      return finish.apply(sum, row, col);
    }
  }

 private:
  template <class T, int kCount>
  using Terms = T[std::is_empty_v<T> ? 1 : kCount];

  template <class T, size_t kCount>
  __device__ __forceinline__ void set(T (&terms)[kCount], int index, const Finish& finish,
                                      int of) const {
    if constexpr (std::is_empty_v<T>) {
      return;
    } else if constexpr (std::is_same_v<T, Feature>) {
      terms[index] = finish.feature(of);
    } else {
      terms[index] = finish.token(of);
    }
  }

  template <class T, size_t kCount>
  __device__ __forceinline__ T get(const T (&terms)[kCount], int index) const {
    return terms[std::is_empty_v<T> ? 0 : index];
  }

  Terms<Row, C::kRows> rows_;
  Terms<Col, C::kCols> cols_[kMathGroups];
};

// Finish for sums that want a bias at most. Params have m, n, out and the bias.
template <class Params>
struct AddBias {
  using Feature = float;
  struct Token {};

  __device__ __forceinline__ explicit AddBias(const Params& params)
      : params(params), m(params.m), n(params.n), out(params.out) {}

  __device__ __forceinline__ float feature(int64_t feature) const {
    if (params.bias == nullptr || feature >= n) return 0.0f;
    return device_load_float(params.bias, params.bias_dtype, feature * params.stride_bias);
  }
  __device__ __forceinline__ Token token(int64_t) const { return {}; }
  __device__ __forceinline__ float apply(float sum, float bias, Token) const { return sum + bias; }

  const Params& params;
  const int64_t m, n;
  void* const out;
};

// A whole tile: finishes its sums, rounds them to 16 bits, and leaves them to TMA, which one thread
// of each warpgroup starts. Shared memory takes strips of 64 features, [token][feature] under the
// 128-byte swizzle, of C::kOutCols columns; a tile of more goes out in turns.
template <class C, class OutT, class Finish>
__device__ __forceinline__ void store_tile(const Finish& finish, const TileTerms<C, Finish>& terms,
                                           const CUtensorMap& out_map, uint8_t* out_smem,
                                           const TileSchedule::Work& work,
                                           const Accumulators<C>& sums) {
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int first_block = group * C::kRowBlocks;
  // Where there are no sums yet, what was there before has been read.
  const auto begin_turn = [&](bool first) {
    if (!first && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
    ptx::named_barrier_sync<128>(kMathBarrier + 1 + group);
  };
  // Four matrices of 8 x 8: rows and those 8 on, of columns 16 i .. and 16 i + 8 ..
  const auto round_sums = [&](int block, int i, uint32_t (&matrices)[4]) {
    const int row = (first_block + block) * kBlockRows + warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* sum = &sums[block][8 * i + 2 * j];
      const int col = 16 * i + j / 2 * 8 + lane % 4 * 2;
      const auto row_terms = terms.row(row + j % 2 * 8);
      matrices[j] =
          ptx::pack_pair<OutT>(terms.apply(finish, sum[0], row_terms, terms.col(col)),
                               terms.apply(finish, sum[1], row_terms, terms.col(col + 1)));
    }
  };
  const auto store_strip = [&](uint8_t* strip, int feature, int token) {
    if (feature < finish.n) ptx::tma_store_2d(&out_map, strip, feature, token);
  };
  const auto end_turn = [&] {
    ptx::fence_async_proxy();
    ptx::named_barrier_sync<128>(kMathBarrier + 1 + group);
  };
  if constexpr (C::kTokenRows) {
    static_assert(C::kOutCols == 64);
    // Lane i points at a token's 16 bytes of 8 features: tokens i % 16, features of chunk i / 16.
    const int token = warp * 16 + lane % 16;
    uint8_t* strip = out_smem + group * C::kOutStripBytes;
#pragma unroll
    for (int block = 0; block < C::kRowBlocks; ++block) {
#pragma unroll
      for (int first = 0; first < C::kCols; first += C::kOutCols) {
        begin_turn(block == 0 && first == 0);
#pragma unroll
        for (int i = 0; i < C::kOutCols / 16; ++i) {
          uint32_t matrices[4];
          round_sums(block, first / 16 + i, matrices);
          const int chunk = 2 * i + lane / 16;
          ptx::stmatrix_x4(strip + token * 128 + ((chunk ^ (token % 8)) << 4), matrices);
        }
        end_turn();
        if (threadIdx.x % 128 == 0) {
          store_strip(strip, work.col_tile * C::kCols + first,
                      work.row_tile * C::kRows + (first_block + block) * kBlockRows);
          ptx::bulk_commit();
        }
      }
    }
  } else {
#pragma unroll
    for (int first = 0; first < C::kCols; first += C::kOutCols) {
      begin_turn(first == 0);
#pragma unroll
      for (int block = 0; block < C::kRowBlocks; ++block) {
        // Lane i points at a token's 16 bytes of 8 features: tokens i % 8 and, from 16 on, those 8
        // on.
        const int chunk = 2 * warp + lane / 8 % 2;
        uint8_t* out = out_smem + (first_block + block) * C::kOutStripBytes +
                       (lane / 16 * 8 + lane % 8) * 128 + ((chunk ^ (lane % 8)) << 4);
#pragma unroll
        for (int i = 0; i < C::kOutCols / 16; ++i) {
          uint32_t matrices[4];
          round_sums(block, first / 16 + i, matrices);
          ptx::stmatrix_x4_trans(out + i * 16 * 128, matrices);
        }
      }
      end_turn();
      if (threadIdx.x % 128 == 0) {
#pragma unroll
        for (int block = first_block; block < first_block + C::kRowBlocks; ++block) {
          store_strip(out_smem + block * C::kOutStripBytes,
                      work.row_tile * C::kRows + block * kBlockRows,
                      work.col_tile * C::kCols + first);
        }
        ptx::bulk_commit();
      }
    }
  }
}

// Four neighbouring values of a row of the output.
template <class OutT>
__device__ __forceinline__ void store_quad(OutT* out, const float (&values)[4]) {
  if constexpr (sizeof(OutT) == 4) {
    *reinterpret_cast<float4*>(out) = {values[0], values[1], values[2], values[3]};
  } else {
    *reinterpret_cast<uint2*>(out) = {ptx::pack_pair<OutT>(values[0], values[1]),
                                      ptx::pack_pair<OutT>(values[2], values[3])};
  }
}

// A tile of which this CTA has one slice: leaves its sums where the cluster can read them, then
// adds those of all slices, in order, for its share of the tokens. n is a multiple of 4.
template <class C, class OutT, class Finish>
__device__ __forceinline__ void store_split_tile(const Finish& finish,
                                                 const TileTerms<C, Finish>& terms,
                                                 uint8_t* ring_smem, const TileSchedule& schedule,
                                                 const TileSchedule::Work& work,
                                                 const Accumulators<C>& sums) {
  static_assert(!C::kTokenRows);
  auto* const sums_smem = reinterpret_cast<float*>(ring_smem);
  constexpr int kStride = C::kRows + kSumPadding;
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  ptx::named_barrier_sync<kMathThreads>(kMathBarrier);  // the ring has been read by all
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) {
    const int row = (group * C::kRowBlocks + block) * kBlockRows + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < C::kCols / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums_smem[token * kStride + row + i / 2 % 2 * 8] = sums[block][i];
    }
  }
  ptx::fence_async_proxy();  // the ring will be filled again
  ptx::cluster_sync();
  const int slices = schedule.slices,
            slice = static_cast<int>(blockIdx.x) / C::kNeighbours % slices;
  const int neighbour = static_cast<int>(blockIdx.x) % C::kNeighbours;
  constexpr int kQuads = C::kRows / 4;
  static_assert(kMathThreads % kQuads == 0, "a thread's rows are the same for all of its tokens");
  const int quad = threadIdx.x % kQuads, first_row = work.row_tile * C::kRows + quad * 4;
  const int first_token = work.col_tile * C::kCols;
  const int tokens = min(static_cast<int>(finish.m) - first_token, C::kCols);
  // Loads from other CTAs take their time: those of several tokens, or of all slices, at once.
  constexpr int kBatch = std::max(1, C::kCols / 16), kUnroll = std::max(1, 8 / kBatch);
  const int token_stride = slices * kMathThreads / kQuads;
  const int own_token = (static_cast<int>(threadIdx.x) + slice * kMathThreads) / kQuads;
  for (int first = own_token; first < tokens; first += kBatch * token_stride) {
    if (first_row >= finish.n) break;
    float sums_of[kBatch][4] = {};
#pragma unroll kUnroll
    for (int rank = neighbour; rank < slices * C::kNeighbours; rank += C::kNeighbours) {
      float4 parts[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int token = first + i * token_stride;
        const auto* own = reinterpret_cast<const float4*>(sums_smem + token * kStride) + quad;
        if (token < tokens) parts[i] = ptx::load_cluster_smem(own, rank);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        sums_of[i][0] += parts[i].x, sums_of[i][1] += parts[i].y;
        sums_of[i][2] += parts[i].z, sums_of[i][3] += parts[i].w;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int token = first + i * token_stride;
      if (token >= tokens) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums_of[i][j] =
            terms.apply(finish, sums_of[i][j], terms.row(quad * 4 + j), terms.col(token));
      }
      store_quad(static_cast<OutT*>(finish.out) + (first_token + token) * finish.n + first_row,
                 sums_of[i]);
    }
  }
  ptx::cluster_sync_relaxed();  // nobody overwrites, or leaves with, what others still read
}

}  // namespace effllm
