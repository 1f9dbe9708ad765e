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

// Two e4m3, the low half of `pair`, times e4m3_factor(), as float16: exact, but for NaN. Before
// sm_89 there is no instruction for it: the magnitude moves to its place one bit to the right,
// where its exponent counts for 2^8 less.
__device__ __forceinline__ uint32_t half_pair_from_e4m3(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "}"
      : "=r"(halves)
      : "r"(pair));
  return halves;
#else
  const uint32_t bytes = __byte_perm(pair, 0, 0x1404);
  return (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u);
#endif
}

// What to multiply by to get e4m3 from half_pair_from_e4m3.
__device__ __forceinline__ constexpr float e4m3_factor() {
#if __CUDA_ARCH__ >= 890
  return 1.f;
#else
  return 256.f;
#endif
}

// 2^x to 2 ulp; 0 for -inf, inf for inf, subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace effllm::ptx
