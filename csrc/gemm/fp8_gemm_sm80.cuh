// e4m3 weights, and x in e4m3 or 16 bits, for the kernel of strip_gemm_sm80.cuh; or int8 weights
// and x in 16 bits.
//
// Roofline: for few tokens the N * K bytes of weights are all that counts; for many tokens the
// 16-bit tensor cores, which take codes as exact float16 or, beside a bf16 x, as exact bfloat16.
//
// A weight's rows lie in memory as they are, so a lane takes 16 neighbouring columns of its two
// rows, four for each k-step:
//
//   columns of a tile   0..15    16..31   32..47   48..63
//   lane c              0        1        2        3          4 bytes of the 16 per step
//
// mma only asks that x has the same order: a lane reads 8 neighbouring values for two steps.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemm/fp8_gemm.h"
#include "gemm/fp8_scale.cuh"
#include "gemm/strip_gemm_sm80.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// X is the type of x: float8_e4m3, float16 or bfloat16. Dequant_ is that of dequant.cuh which
// decodes the weights.
template <class X, class Out, template <class> class Dequant_ = E4M3Dequant>
struct Fp8Operands {
  static constexpr bool kQuantizedX = std::is_same_v<X, float8_e4m3>;
  using InT = std::conditional_t<kQuantizedX, float16, X>;
  using Sum = float;
  using OutT = Out;
  using Params = Fp8GemmParams;
  using Dequant = Dequant_<InT>;
  struct Codes {
    uint32_t words[2][4];  // rows g and g + 8; a word per k-step
  };
  using XChunk = std::conditional_t<kQuantizedX, uint2, uint4>;
  // Steps one by one read from banks in conflict: what the registers of a wider x leave room for.
  static constexpr int kScaleSteps = 4, kXSteps = kQuantizedX ? 2 : 1;
  static constexpr int kLaneColumns = 16;  // of a tile

  __device__ __forceinline__ Fp8Operands(const Params& params, int64_t strip, int thread) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows past N are computed and never stored: any row in bounds will do.
      const int64_t row = strip * kStripRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
      rows_gmem[half] = params.weight + min(row, params.n - 1) * params.stride_weight_n +
                        kLaneColumns * (thread % 4);
    }
  }

  __device__ __forceinline__ Codes load_codes(const Params& params, int64_t tile) const {
    const int64_t left = params.k - tile * 64 - threadIdx.x % 4 * kLaneColumns;
    Codes codes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_bytes<kLaneColumns>(rows_gmem[half] + tile * 64, left, codes.words[half]);
    }
    return codes;
  }

  static __device__ __forceinline__ XChunk load_x(const Params& params, int64_t m, int64_t k) {
    if constexpr (kQuantizedX) {
      uint32_t words[2] = {};
      const auto* x = static_cast<const uint8_t*>(params.x) + m * params.k + k;
      if (m < params.m) load_bytes<8>(x, params.k - k, words);
      return {words[0], words[1]};
    } else {
      return load_x_chunk(params, m, k);
    }
  }

  static __device__ __forceinline__ uint4 x_values(const XChunk& chunk) {
    if constexpr (kQuantizedX) {
      return {Dequant::pair(chunk.x), Dequant::pair(chunk.x >> 16), Dequant::pair(chunk.y),
              Dequant::pair(chunk.y >> 16)};
    } else {
      return chunk;
    }
  }

  __device__ __forceinline__ void load_scales(const Params& params, int64_t row, int64_t k) {
    if (!params.grouped()) return;
    group = k / kFp8GroupSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      w_scale[half] =
          load_fp8_scale(params.w_scales, min(row + 8 * half, params.n - 1), group) * kFactor;
    }
  }

  __device__ __forceinline__ void weight_fragment(const Codes& codes, int step, int, int64_t,
                                                  uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half] = Dequant::pair(codes.words[half][step]);
      a[half + 2] = Dequant::pair(codes.words[half][step] >> 16);
    }
  }

  static __device__ __forceinline__ void x_fragments(const uint16_t* x_smem, int step, int c,
                                                     uint32_t (&b)[kXSteps][2]) {
    const uint16_t* x = x_smem + kLaneColumns * c + 4 * step;
    if constexpr (kXSteps == 2) {
      const uint4 values = *reinterpret_cast<const uint4*>(x);
      b[0][0] = values.x, b[0][1] = values.y, b[1][0] = values.z, b[1][1] = values.w;
    } else {
      const uint2 values = *reinterpret_cast<const uint2*>(x);
      b[0][0] = values.x, b[0][1] = values.y;
    }
  }

  // Tokens past M have sums of 0 or NaN, never stored, and the scales of the last one.
  template <int kTokenTiles>
  __device__ __forceinline__ void add(const Params& params, int64_t first_token,
                                      const float (&partial)[kTokenTiles][4],
                                      float (&sums)[kTokenTiles][4]) const {
    if (!params.grouped()) {
#pragma unroll
      for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[token_tile][i] += partial[token_tile][i];
      }
      return;
    }
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t token = first_token + 8 * token_tile + threadIdx.x % 4 * 2 + odd;
        const float x_scale = load_fp8_scale(params.x_scales, min(token, params.m - 1), group);
#pragma unroll
        for (int i = odd; i < 4; i += 2) {
          sums[token_tile][i] += partial[token_tile][i] * w_scale[i / 2] * x_scale;
        }
      }
    }
  }

  static __device__ __forceinline__ float finish(const Params& params, int64_t m, int64_t n,
                                                 float sum) {
    if (params.grouped()) return sum;
    return sum * (load_fp8_scale(params.w_scales, n, 0) * kFactor) *
           load_fp8_scale(params.x_scales, m, 0);
  }

  // What the products of decoded operands are to be multiplied by.
  static constexpr float kFactor = Dequant::kFactor * (kQuantizedX ? Dequant::kFactor : 1.f);

  const uint8_t* rows_gmem[2];
  float w_scale[2];
  int64_t group;
};

}  // namespace effllm
