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
//   apply(sum, feature, token)     sum is a C::Sum
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "common/math.h"
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

template <class C>
using Accumulators = typename C::Sum[C::kRowBlocks][C::kCols / 2];

// What a Finish wants to know of a tile, in shared memory when its sums are there. Each warpgroup
// has its rows and all columns.
template <class C, class Finish>
class TileTerms {
 public:
  using Feature = typename Finish::Feature;
  using Token = typename Finish::Token;
  using Row = std::conditional_t<C::kTokenRows, Token, Feature>;
  using Col = std::conditional_t<C::kTokenRows, Feature, Token>;

  // A thread's part of them: on its way from global memory while the products are made, as loads
  // before them or at the end would have nothing to hide behind.
  struct Part {
    Row row;
    Col cols[ceil_div(C::kCols, 128)];
  };

  static __device__ __forceinline__ Part load(const Finish& finish,
                                              const TileSchedule::Work& work) {
    const int thread = threadIdx.x % 128;
    Part part{};
    if (thread < kGroupRows) {
      part.row = load<Row>(finish, work.row_tile * C::kRows + first_row() + thread);
    }
#pragma unroll
    for (int i = 0; i < ceil_div(C::kCols, 128); ++i) {
      const int col = i * 128 + thread;
      if (col < C::kCols) part.cols[i] = load<Col>(finish, work.col_tile * C::kCols + col);
    }
    return part;
  }

  // Between the stores of the tile before and a barrier of the warpgroup.
  __device__ __forceinline__ void keep(const Part& part) {
    const int thread = threadIdx.x % 128;
    if constexpr (!std::is_empty_v<Row>) {
      if (thread < kGroupRows) rows_[first_row() + thread] = part.row;
    }
    if constexpr (!std::is_empty_v<Col>) {
#pragma unroll
      for (int i = 0; i < ceil_div(C::kCols, 128); ++i) {
        const int col = i * 128 + thread;
        if (col < C::kCols) cols_[threadIdx.x / 128][col] = part.cols[i];
      }
    }
  }

  __device__ __forceinline__ Row row(int row) const { return get(rows_, row); }
  __device__ __forceinline__ Col col(int col) const { return get(cols_[threadIdx.x / 128], col); }

  __device__ __forceinline__ float apply(const Finish& finish, typename C::Sum sum, Row row,
                                         Col col) const {
    if constexpr (C::kTokenRows) {
      return finish.apply(sum, col, row);
    } else {
      return finish.apply(sum, row, col);
    }
  }

 private:
  static constexpr int kGroupRows = C::kRowBlocks * kBlockRows;

  template <class T, int kCount>
  using Terms = T[std::is_empty_v<T> ? 1 : kCount];

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 128 * kGroupRows; }

  template <class T>
  static __device__ __forceinline__ T load(const Finish& finish, int of) {
    if constexpr (std::is_empty_v<T>) {
      return {};
    } else if constexpr (std::is_same_v<T, Feature>) {
      return finish.feature(of);
    } else {
      return finish.token(of);
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
// 128-byte swizzle, of C::kOutCols columns; a tile of more goes out in turns. What was there before
// the first has been read, as that thread knows.
template <class C, class OutT, class Finish>
__device__ __forceinline__ void store_tile(const Finish& finish, const TileTerms<C, Finish>& terms,
                                           const CUtensorMap& out_map, uint8_t* out_smem,
                                           const TileSchedule::Work& work,
                                           const Accumulators<C>& sums) {
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int first_block = group * C::kRowBlocks;
  constexpr int kStripsPerBlock = C::kTokenRows ? C::kOutCols / kBlockRows : 1;
  uint8_t* const strips = out_smem + first_block * kStripsPerBlock * C::kOutStripBytes;
#pragma unroll
  for (int first_col = 0; first_col < C::kCols; first_col += C::kOutCols) {
    if (first_col > 0 && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
    ptx::named_barrier_sync<128>(kMathBarrier + 1 + group);
#pragma unroll
    for (int block = 0; block < C::kRowBlocks; ++block) {
      const int row = (first_block + block) * kBlockRows + warp * 16 + lane / 4;
      const typename TileTerms<C, Finish>::Row rows[2] = {terms.row(row), terms.row(row + 8)};
#pragma unroll
      for (int i = 0; i < C::kOutCols / 16; ++i) {
        // Four matrices of 8 x 8: rows and those 8 on, of columns 16 i .. and 16 i + 8 ..
        uint32_t matrices[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int col = first_col + 16 * i + j / 2 * 8;  // the warp's
          const auto* sum = &sums[block][col / 2 + j % 2 * 2];
          const auto first = terms.col(col + lane % 4 * 2),
                     second = terms.col(col + lane % 4 * 2 + 1);
          matrices[j] = ptx::pack_pair<OutT>(terms.apply(finish, sum[0], rows[j % 2], first),
                                             terms.apply(finish, sum[1], rows[j % 2], second));
        }
        // A lane points at a token's 16 bytes of 8 features.
        if constexpr (C::kTokenRows) {
          const int token = warp * 16 + lane % 16, chunk = i % 4 * 2 + lane / 16;
          uint8_t* strip = strips + (block * kStripsPerBlock + i / 4) * C::kOutStripBytes;
          ptx::stmatrix_x4(strip + token * 128 + ((chunk ^ (token % 8)) << 4), matrices);
        } else {
          const int token = i * 16 + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
          uint8_t* strip = strips + block * C::kOutStripBytes;
          ptx::stmatrix_x4_trans(strip + token * 128 + ((chunk ^ (lane % 8)) << 4), matrices);
        }
      }
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync<128>(kMathBarrier + 1 + group);
    if (threadIdx.x % 128 != 0) continue;
#pragma unroll
    for (int strip = 0; strip < C::kRowBlocks * kStripsPerBlock; ++strip) {
      const int row =
          work.row_tile * C::kRows + (first_block + strip / kStripsPerBlock) * kBlockRows;
      const int col = work.col_tile * C::kCols + first_col + strip % kStripsPerBlock * kBlockRows;
      const int feature = C::kTokenRows ? col : row, token = C::kTokenRows ? row : col;
      if (feature < finish.n) {
        ptx::tma_store_2d(&out_map, strips + strip * C::kOutStripBytes, feature, token);
      }
    }
    ptx::bulk_commit();
  }
}

// What the slices of a tile's K add up to. A piece is what four warps have of 64 rows and 8
// columns, 4 sums a lane. Each CTA of the cluster finishes some of the tile's pieces, and gets them
// from all into its ring, which all have read by then:
//
//   ring   [ from slice 0: its pieces ][ from slice 1: the same pieces ] ..     2 KB each
//
// A sum that arrives counts on a barrier there: no fence, and no round trip.
template <class C>
class SliceSums {
 public:
  using Quad = std::conditional_t<std::is_integral_v<typename C::Sum>, int4, float4>;
  static constexpr int kPieces = C::kRowBlocks * C::kCols / 4;
  static constexpr int kPieceBytes = kBlockRows * 8 * sizeof(typename C::Sum);
  static constexpr int kSmemBytes = (kPieces + kMaxClusterCtas) * kPieceBytes;

  // The CTA with slice s has rank `first_rank` + s * C::kNeighbours in the cluster.
  __device__ __forceinline__ SliceSums(uint8_t* smem, uint64_t* received, int slices, int slice,
                                       int first_rank)
      : smem_(smem),
        received_(received),
        slices_(slices),
        slice_(slice),
        first_rank_(first_rank),
        reciprocal_((1 << 16) / slices + 1) {}

  // All of the cluster, when none of them reads its ring any more.
  __device__ __forceinline__ void exchange(const Accumulators<C>& sums) const {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_bytes(received_, num_pieces() * (slices_ - 1) * kPieceBytes);
    }
    constexpr int kGroupPieces = kPieces / kMathGroups;
    uint8_t* const own_sums = at(slice_, 0) + threadIdx.x % 128 * sizeof(Quad);
#pragma unroll
    for (int i = 0; i < kGroupPieces; ++i) {
      const int piece = static_cast<int>(threadIdx.x) / 128 * kGroupPieces + i;
      const int slice = ((piece + 1) * slices_ - 1) / kPieces;
      uint8_t* const to = own_sums + (piece - first_piece(slice)) * kPieceBytes;
      const auto* sum = &sums[i / (C::kCols / 8)][i % (C::kCols / 8) * 4];
      const Quad values{sum[0], sum[1], sum[2], sum[3]};
      if (slice == slice_) {
        *reinterpret_cast<Quad*>(to) = values;
      } else {
        ptx::store_async_cluster(to, received_, first_rank_ + slice * C::kNeighbours, values);
      }
    }
  }

  // finish(row, column, sums, smem) by a warp for each of this CTA's pieces: the first row and
  // column, the sums of all slices, and 1 KB to use.
  template <class F>
  __device__ __forceinline__ void add(uint32_t phase, const F& finish) const {
    ptx::named_barrier_sync<kMathThreads>(kMathBarrier);  // this CTA's own sums are there
    ptx::mbarrier_wait(received_, phase);
#pragma unroll 1
    for (int own = threadIdx.x / 32; own < num_pieces(); own += kMathThreads / 32) {
      Quad sums[4] = {};  // of the rows of a warp each
#pragma unroll 2
      for (int from = 0; from < slices_; ++from) {
        const auto* parts = reinterpret_cast<const Quad*>(at(from, own)) + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Quad part = parts[i * 32];
          sums[i].x += part.x, sums[i].y += part.y, sums[i].z += part.z, sums[i].w += part.w;
        }
      }
      const int piece = first_piece(slice_) + own;
      finish(piece / (C::kCols / 8) * kBlockRows, piece % (C::kCols / 8) * 8, sums, at(0, own));
    }
  }

 private:
  // Slices' pieces follow each other. x / slices for x up to 8 kPieces.
  __device__ __forceinline__ int divide(int x) const { return x * reciprocal_ >> 16; }
  __device__ __forceinline__ int first_piece(int slice) const { return divide(slice * kPieces); }
  __device__ __forceinline__ int num_pieces() const {
    return first_piece(slice_ + 1) - first_piece(slice_);
  }
  __device__ __forceinline__ uint8_t* at(int from, int piece) const {
    const int max_pieces = divide(kPieces - 1) + 1;
    return smem_ + (from * max_pieces + piece) * kPieceBytes;
  }

  uint8_t* const smem_;
  uint64_t* const received_;
  const int slices_, slice_, first_rank_, reciprocal_;
};

// A tile of which this CTA has one slice. n is a multiple of 8.
template <class C, class OutT, class Finish>
__device__ __forceinline__ void store_split_tile(const Finish& finish,
                                                 const TileTerms<C, Finish>& terms,
                                                 const SliceSums<C>& slices, uint32_t phase,
                                                 const TileSchedule::Work& work,
                                                 const Accumulators<C>& sums) {
  const int lane = threadIdx.x % 32;
  ptx::cluster_sync_relaxed();
  slices.exchange(sums);
  using Quad = typename SliceSums<C>::Quad;
  slices.add(phase, [&](int first_row, int first_col, Quad(&sums)[4], uint8_t* smem) {
    const int row = first_row + lane / 4, col = first_col + lane % 4 * 2;
    const typename TileTerms<C, Finish>::Col cols[2] = {terms.col(col), terms.col(col + 1)};
    float values[8][2];  // of rows 8 apart
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto row_terms = terms.row(row + 8 * i);
      const Quad& sum = sums[i / 2];
      values[i][0] = terms.apply(finish, i % 2 == 0 ? sum.x : sum.z, row_terms, cols[0]);
      values[i][1] = terms.apply(finish, i % 2 == 0 ? sum.y : sum.w, row_terms, cols[1]);
    }
    // Where a row and a column of the tile go; null if not into the output.
    const auto out = [&](int row, int col) -> OutT* {
      row += work.row_tile * C::kRows, col += work.col_tile * C::kCols;
      const int64_t token = C::kTokenRows ? row : col, feature = C::kTokenRows ? col : row;
      if (token >= finish.m || feature >= finish.n) return nullptr;
      return static_cast<OutT*>(finish.out) + token * finish.n + feature;
    };
    if constexpr (sizeof(OutT) == 4) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (OutT* to = out(row + 8 * i, col + j)) *to = values[i][j];
        }
      }
    } else {
      // A lane gets 8 features of a token, to store at once. In shared memory: [64 tokens][8
      // features], or [8 tokens][64 features] under a swizzle.
      const auto chunk = [&](int token, int i) {
        return smem + (C::kTokenRows ? token * 16 : token * 128 + ((i ^ token) << 4));
      };
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t matrices[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          matrices[j] = ptx::pack_pair<OutT>(values[i * 4 + j][0], values[i * 4 + j][1]);
        }
        if constexpr (C::kTokenRows) {
          ptx::stmatrix_x4(chunk(i * 32 + lane, 0), matrices);
        } else {
          ptx::stmatrix_x4_trans(chunk(lane % 8, i * 4 + lane / 8), matrices);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = C::kTokenRows ? i * 32 + lane : i * 4 + lane / 8;
        OutT* to = C::kTokenRows ? out(first_row + token, first_col)
                                 : out(first_row + lane % 8 * 8, first_col + token);
        if (to != nullptr) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(chunk(token, lane % 8));
        }
      }
    }
  });
}

}  // namespace effllm
