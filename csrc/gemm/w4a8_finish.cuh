// What becomes of w4a8_gemm's sums on Hopper, as w4a8_gemm.h says it.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"
#include "gemm/int8_finish.cuh"
#include "gemm/w4a8_gemm.h"

namespace effllm {

// What becomes of a tile's sums. With one group they are exact: int8_gemm.h's operations follow.
template <bool kGrouped, int kShift>
struct W4A8Finish;

struct W4A8FinishBase {
  struct Token {
    float scale;
  };

  __device__ __forceinline__ explicit W4A8FinishBase(const W4A8GemmParams& params)
      : params(params), m(params.m), n(params.n), out(params.out) {}

  __device__ __forceinline__ Token token(int64_t token) const {
    return {load_int8_scale(params.x_scales, min(token, m - 1))};
  }
  __device__ __forceinline__ float bias(int64_t feature) const {
    if (params.bias == nullptr) return 0.0f;
    return device_load_float(params.bias, params.bias_dtype, feature * params.stride_bias);
  }

  const W4A8GemmParams& params;
  const int64_t m, n;
  void* const out;
};

template <int kShift>
struct W4A8Finish<false, kShift> : W4A8FinishBase {
  struct Feature {
    float scale, bias;
  };
  using W4A8FinishBase::W4A8FinishBase;

  __device__ __forceinline__ Feature feature(int64_t feature) const {
    const int64_t row = min(feature, n - 1);
    return {device_load_float(params.scales, params.scales_dtype, row * params.stride_scales_n),
            bias(row)};
  }
  __device__ __forceinline__ float apply(int32_t sum, Feature feature, Token token) const {
    const float exact = __int2float_rn(sum >> kShift);
    return __fadd_rn(__fmul_rn(exact, __fmul_rn(feature.scale, token.scale)), feature.bias);
  }
};

template <int kShift>
struct W4A8Finish<true, kShift> : W4A8FinishBase {
  using Feature = float;  // its bias
  using W4A8FinishBase::W4A8FinishBase;

  __device__ __forceinline__ float feature(int64_t feature) const {
    return bias(min(feature, n - 1));
  }
  __device__ __forceinline__ float apply(float sum, float bias, Token token) const {
    return __fadd_rn(__fmul_rn(sum, token.scale), bias);
  }
};

}  // namespace effllm
