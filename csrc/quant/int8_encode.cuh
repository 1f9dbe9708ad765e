// int8 codes on the GPU; the arithmetic is int8_layout.h's to the bit.
#pragma once

#include <cstdint>

#include "quant/code_scale.cuh"
#include "quant/int8_layout.h"

namespace effllm {

struct Int8Scale : CodeScale {
  static constexpr float kLargest = kInt8Max;

  static __device__ __forceinline__ Int8Scale of(float scale) { return {CodeScale::of(scale)}; }

  // The conversion rounds to nearest even, saturates, and makes NaN 0.
  static __device__ __forceinline__ uint32_t code(float quotient) {
    return static_cast<uint32_t>(min(max(__float2int_rn(quotient), -128), 127)) & 0xff;
  }

  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    return code(low) | code(high) << 8;
  }
};

}  // namespace effllm
