// 4-bit weights and int8 x for the kernel of strip_gemm_sm80.cuh.
//
// Roofline: for few tokens the N * K / 2 bytes of codes are all that counts; for many tokens the
// int8 tensor cores, at twice the rate of 16 bits. x comes in order and is brought into that of the
// codes on its way to shared memory: four instructions for 16 columns of a token.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/vec.cuh"
#include "gemm/int8_finish.cuh"
#include "gemm/int8_gemm_sm80.cuh"
#include "gemm/strip_gemm_sm80.cuh"
#include "gemm/w4a8_codes.cuh"
#include "gemm/w4a8_gemm.h"

namespace effllm {

// `kGroupSteps`: k-steps, of 32 columns, per scale, or, if kMultiplies, multiplier; 0 for a single
// group.
template <int kGroupSteps, bool kMultiplies = false>
struct W4A8Operands {
  static constexpr bool kGrouped = kGroupSteps > 0 && !kMultiplies;  // each group's sum is scaled
  using InT = int8_t;
  using Sum = std::conditional_t<kGrouped, float, int32_t>;
  using OutT = void;
  using Params = W4A8GemmParams;
  using Decode = W4A8Codes<kMultiplies ? W4A8Decoding::kMultipliers : W4A8Decoding::kZeros>;
  struct Codes {
    uint4 tiles[2];  // of 64 columns; a word per 16
  };
  using XChunk = uint4;
  static constexpr int kScaleSteps = kGroupSteps > 0 ? kGroupSteps : 4, kXSteps = 1;
  static constexpr int kTileChunks = kInt4TileWords / 4;

  __device__ __forceinline__ W4A8Operands(const Params& params, int64_t strip, int thread)
      : codes_gmem(
            reinterpret_cast<const uint4*>(params.qweight + strip * params.stride_qweight_strip) +
            thread) {
    if (kGroupSteps == 0)
      load_group(params, strip * kStripRows + thread / 32 * 16 + thread % 32 / 4, 0);
  }

  // Past K x is zero: any codes will do.
  __device__ __forceinline__ Codes load_codes(const Params& params, int64_t tile) const {
    Codes codes{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t first_column = (2 * tile + i) * 64;
      if (first_column < params.k) {
        codes.tiles[i] = __ldcs(codes_gmem + (2 * tile + i) * kTileChunks);
      }
    }
    return codes;
  }

  static __device__ __forceinline__ XChunk load_x(const Params& params, int64_t m, int64_t k) {
    return load_int8_x_chunk(params, m, k);
  }

  static __device__ __forceinline__ uint4 x_values(const XChunk& chunk) {
    return w4a8_x_order(chunk);
  }

  __device__ __forceinline__ void load_scales(const Params& params, int64_t row, int64_t k) {
    if (kGroupSteps > 0) load_group(params, row, k / (32 * kScaleSteps));
  }

  __device__ __forceinline__ void load_group(const Params& params, int64_t row, int64_t group) {
    // Of columns past K, whose x is zero, any number will do; the last scale may be none.
    const W4A8Multipliers& multipliers = params.multipliers;
    const bool exists = group < (kMultiplies ? multipliers.num_groups : params.num_groups);
    int bytes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows past N are computed on padding and never stored: any scale in bounds will do.
      const int64_t n = min(row + 8 * half, params.n - 1);
      if (kGrouped) {
        const int64_t idx = n * params.stride_scales_n + group * params.stride_scales_g;
        scale[half] = exists ? device_load_float(params.scales, params.scales_dtype, idx) : 0.f;
      }
      bytes[half] = kInt4PaddingCode;
      if (kMultiplies && exists) {
        bytes[half] = multipliers.data[n * multipliers.stride_n + group * multipliers.stride_g];
      } else if (!kMultiplies && exists && params.zeros != nullptr) {
        bytes[half] = params.zeros[n * params.stride_zeros_n + group * params.stride_zeros_g];
      }
    }
    rows = Decode::rows(Decode::pair(bytes[0], bytes[1]));
  }

  __device__ __forceinline__ void weight_fragment(const Codes& codes, int step, int, int64_t,
                                                  uint32_t (&a)[4]) const {
    const uint4& tile = codes.tiles[step / 2];
    Decode::decode(step % 2 == 0 ? tile.x : tile.z, rows, a[0], a[1]);
    Decode::decode(step % 2 == 0 ? tile.y : tile.w, rows, a[2], a[3]);
  }

  static __device__ __forceinline__ void x_fragments(const uint16_t* x_smem, int step, int c,
                                                     uint32_t (&b)[kXSteps][2]) {
    const uint16_t* x = x_smem + 16 * step + 2 * c;
    b[0][0] = *reinterpret_cast<const uint32_t*>(x);
    b[0][1] = *reinterpret_cast<const uint32_t*>(x + 8);
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void add(const Params&, int64_t,
                                      const int32_t (&partial)[kTokenTiles][4],
                                      Sum (&sums)[kTokenTiles][4]) const {
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kGrouped) {
          sums[token_tile][i] += scale[i / 2] * __int2float_rn(partial[token_tile][i]);
        } else {
          sums[token_tile][i] += partial[token_tile][i];
        }
      }
    }
  }

  static __device__ __forceinline__ float finish(const Params& params, int64_t m, int64_t n,
                                                 Sum sum) {
    const float x_scale = load_int8_scale(params.x_scales, m);
    if constexpr (kGrouped) {
      return __fmul_rn(sum, x_scale);
    } else {
      const float w_scale =
          device_load_float(params.scales, params.scales_dtype, n * params.stride_scales_n);
      return __fmul_rn(__int2float_rn(sum), __fmul_rn(w_scale, x_scale));
    }
  }

  const uint4* codes_gmem;
  float scale[2];
  typename Decode::Rows rows;
};

inline void launch_w4a8_multipliers_sm80(const char* op, const W4A8GemmParams& params,
                                         cudaStream_t stream) {
  if (params.multipliers.group_size == 32) {
    launch_strip_gemm_sm80<W4A8Operands<1, true>>(op, params, stream);
  } else if (params.multipliers.group_size == 64) {
    launch_strip_gemm_sm80<W4A8Operands<2, true>>(op, params, stream);
  } else {
    launch_strip_gemm_sm80<W4A8Operands<4, true>>(op, params, stream);
  }
}

inline void launch_w4a8_gemm_sm80(const char* op, const W4A8GemmParams& params,
                                  cudaStream_t stream) {
  if (params.multipliers.data != nullptr) {
    launch_w4a8_multipliers_sm80(op, params, stream);
  } else if (params.num_groups == 1) {
    launch_strip_gemm_sm80<W4A8Operands<0>>(op, params, stream);
  } else if (params.group_size == 32) {
    launch_strip_gemm_sm80<W4A8Operands<1>>(op, params, stream);
  } else if (params.group_size == 64) {
    launch_strip_gemm_sm80<W4A8Operands<2>>(op, params, stream);
  } else {
    launch_strip_gemm_sm80<W4A8Operands<4>>(op, params, stream);
  }
}

}  // namespace effllm
