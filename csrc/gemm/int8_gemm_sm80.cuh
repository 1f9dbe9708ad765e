// int8 weights and x for the kernel of strip_gemm_sm80.cuh.
//
// Roofline: for few tokens the N * K bytes of weights are all that counts; for many tokens the int8
// tensor cores, at twice the rate of 16 bits.
//
// A weight's rows lie in memory as they are, so a lane takes 32 neighbouring columns of its two
// rows, eight for each k-step:
//
//   columns of a tile   0..31    32..63   64..95   96..127
//   lane c              0        1        2        3          8 bytes of the 32 per step
//
// mma only asks that x has the same order: a lane reads 16 neighbouring values for two steps.
#pragma once

#include <cstdint>

#include "gemm/int8_finish.cuh"
#include "gemm/int8_gemm.h"
#include "gemm/strip_gemm_sm80.cuh"

namespace effllm {

// Columns k .. k + 15 of token m of an int8 x, zero outside of it.
template <class Params>
__device__ __forceinline__ uint4 load_int8_x_chunk(const Params& params, int64_t m, int64_t k) {
  uint32_t low[2] = {}, high[2] = {};
  const auto* x = static_cast<const int8_t*>(params.x) + m * params.k + k;
  if (m < params.m) {
    load_bytes<8>(x, params.k - k, low);
    load_bytes<8>(x + 8, params.k - k - 8, high);
  }
  return {low[0], low[1], high[0], high[1]};
}

template <class Out>
struct Int8Operands {
  using InT = int8_t;
  using Sum = int32_t;
  using OutT = Out;
  using Params = Int8GemmParams;
  struct Codes {
    uint32_t words[2][8];  // rows g and g + 8; two words per k-step
  };
  using XChunk = uint4;
  static constexpr int kScaleSteps = 4, kXSteps = 2;
  static constexpr int kTileColumns = 128, kLaneColumns = 32;

  __device__ __forceinline__ Int8Operands(const Params& params, int64_t strip, int thread) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows past N are computed and never stored: any row in bounds will do.
      const int64_t row = strip * kStripRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
      rows_gmem[half] = params.weight + min(row, params.n - 1) * params.stride_weight_n +
                        kLaneColumns * (thread % 4);
    }
  }

  __device__ __forceinline__ Codes load_codes(const Params& params, int64_t tile) const {
    const int64_t left = params.k - tile * kTileColumns - threadIdx.x % 4 * kLaneColumns;
    Codes codes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int8_t* row = rows_gmem[half] + tile * kTileColumns;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t words[4];
        load_bytes<16>(row + 16 * i, left - 16 * i, words);
#pragma unroll
        for (int j = 0; j < 4; ++j) codes.words[half][4 * i + j] = words[j];
      }
    }
    return codes;
  }

  static __device__ __forceinline__ XChunk load_x(const Params& params, int64_t m, int64_t k) {
    return load_int8_x_chunk(params, m, k);
  }

  static __device__ __forceinline__ uint4 x_values(const XChunk& chunk) { return chunk; }

  __device__ __forceinline__ void load_scales(const Params&, int64_t, int64_t) {}

  __device__ __forceinline__ void weight_fragment(const Codes& codes, int step, int, int64_t,
                                                  uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half] = codes.words[half][2 * step];
      a[half + 2] = codes.words[half][2 * step + 1];
    }
  }

  static __device__ __forceinline__ void x_fragments(const uint16_t* x_smem, int step, int c,
                                                     uint32_t (&b)[kXSteps][2]) {
    const uint4 values = *reinterpret_cast<const uint4*>(x_smem + kLaneColumns / 2 * c + 4 * step);
    b[0][0] = values.x, b[0][1] = values.y, b[1][0] = values.z, b[1][1] = values.w;
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void add(const Params&, int64_t,
                                      const int32_t (&partial)[kTokenTiles][4],
                                      int32_t (&sums)[kTokenTiles][4]) const {
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[token_tile][i] += partial[token_tile][i];
    }
  }

  static __device__ __forceinline__ float finish(const Params& params, int64_t m, int64_t n,
                                                 int32_t sum) {
    return scaled_int8_sum(sum, load_int8_feature(params, n), load_int8_token(params, m));
  }

  const int8_t* rows_gmem[2];
};

}  // namespace effllm
