// CUDA's bf16 for a warp on the CPU: storage and conversions, by those of common/dtype.h.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return effllm::to_float(effllm::bfloat16{value.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {effllm::from_float<effllm::bfloat16>(value).bits};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline __nv_bfloat16 __int2bfloat16_rn(int value) {
  return __float2bfloat16_rn(static_cast<float>(value));
}
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 value) { return {value, value}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(__bfloat162float(a.x) - __bfloat162float(b.x)),
          __float2bfloat16_rn(__bfloat162float(a.y) - __bfloat162float(b.y))};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(__bfloat162float(a.x) * __bfloat162float(b.x)),
          __float2bfloat16_rn(__bfloat162float(a.y) * __bfloat162float(b.y))};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  const auto fma = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return __float2bfloat16_rn(
        std::fma(__bfloat162float(x), __bfloat162float(y), __bfloat162float(z)));
  };
  return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}
