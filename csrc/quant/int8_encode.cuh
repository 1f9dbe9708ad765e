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

// With a zero point.
struct AsymmetricInt8Scale : CodeScale {
  int zero;

  // Of a row that reaches so far on both sides of 0, in bits.
  static __device__ __forceinline__ AsymmetricInt8Scale of(int32_t positive, int32_t negative) {
    const int32_t largest = max(positive, negative);
    if (largest >= kInfinityBits) return {CodeScale::of(__int_as_float(0x7fc00000)), 0};
    if (largest == 0) return {CodeScale::of(1.f), 0};
    const float high = __int_as_float(positive), low = __int_as_float(negative);
    const float scale = fmaxf((high * 0.5f + low * 0.5f) / 127.5f, FLT_MIN);
    return {CodeScale::of(scale), __float2int_rn(low / scale) - 128};
  }

  __device__ __forceinline__ uint32_t code(float quotient) const {
    return static_cast<uint32_t>(min(max(__float2int_rn(quotient) + zero, -128), 127)) & 0xff;
  }

  __device__ __forceinline__ uint32_t pair(float low, float high) const {
    return code(low) | code(high) << 8;
  }
};

}  // namespace effllm
