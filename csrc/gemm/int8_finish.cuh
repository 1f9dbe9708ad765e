// What becomes of an exact sum of int8_gemm, as int8_gemm.h says it to the bit.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"
#include "gemm/int8_gemm.h"

namespace effllm {

// Of a row of the weight, and of a token.
struct Int8Feature {
  float scale, bias;
  int32_t sum;
};

struct Int8Token {
  float scale;
  int32_t zero;
};

__device__ __forceinline__ float load_int8_scale(const Int8RowValues& scales, int64_t row) {
  return device_load_float(scales.data, scales.dtype, row * scales.stride);
}

__device__ __forceinline__ Int8Feature load_int8_feature(const Int8GemmParams& params, int64_t n) {
  Int8Feature feature{load_int8_scale(params.w_scales, n), 0.f, 0};
  if (params.bias != nullptr) {
    feature.bias = device_load_float(params.bias, params.bias_dtype, n * params.stride_bias);
  }
  if (params.w_sums.data != nullptr) {
    feature.sum = static_cast<const int32_t*>(params.w_sums.data)[n * params.w_sums.stride];
  }
  return feature;
}

__device__ __forceinline__ Int8Token load_int8_token(const Int8GemmParams& params, int64_t m) {
  Int8Token token{load_int8_scale(params.x_scales, m), 0};
  if (params.x_zeros.data != nullptr) {
    token.zero = static_cast<const int8_t*>(params.x_zeros.data)[m * params.x_zeros.stride];
  }
  return token;
}

// But for the bias. By intrinsics, which no sum that follows is fused with.
__device__ __forceinline__ float scaled_int8_sum(int32_t sum, const Int8Feature& feature,
                                                 const Int8Token& token) {
  const auto exact = __int2float_rn(sum - token.zero * feature.sum);
  return __fmul_rn(exact, __fmul_rn(feature.scale, token.scale));
}

}  // namespace effllm
