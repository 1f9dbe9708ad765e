// Conversions and single-instruction mathematics.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace effllm::ptx {

// Two floats rounded to 16 bits, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>);
  uint32_t pair;
  if constexpr (std::is_same_v<T, float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// 2^x to 2 ulp; 0 for -inf, inf for inf, subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace effllm::ptx
