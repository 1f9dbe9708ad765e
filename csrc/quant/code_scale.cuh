// What kernels that make 8-bit codes share, whatever these are: the scale of some elements and
// their quotients by it. The arithmetic is fp8_layout.h's to the bit.
//
// Codes are of a type derived from CodeScale, which has
//   kLargest       the largest code, where one scale is of both signs
//   code(q)        of a quotient
//   pair(q, r)     of two, the second in the upper byte
#pragma once

#include <cfloat>
#include <cstdint>

#include "cuda/vec.cuh"
#include "quant/fp8_layout.h"

namespace effllm {

__device__ __forceinline__ int32_t magnitude_bits(float x) {
  return __float_as_int(x) & 0x7fffffff;
}

// The scale of elements of which this is the largest.
template <class Scale>
__device__ __forceinline__ float scale_of_largest(int32_t largest_bits) {
  if (largest_bits >= kInfinityBits) return __int_as_float(0x7fc00000);
  if (largest_bits == 0) return 1.f;
  return fmaxf(__int_as_float(largest_bits) / Scale::kLargest, FLT_MIN);
}

// Quotients by one scale. The compiler's division is a branch for each, which keeps them from
// overlapping; of a divisor that is known beforehand they are three operations: a product with its
// reciprocal, the exact remainder, and a correction that rounds to nearest (Markstein, IBM J. Res.
// Dev. 34, 1990; Brisebarre, Muller and Raina, IEEE Trans. Comput. 53, 2004).
struct CodeScale {
  float scale, inverse;
  bool ordinary;  // nothing that matters to a code underflows on the way

  static __device__ __forceinline__ CodeScale of(float scale) {
    const float magnitude = fabsf(scale);
    return {scale, __frcp_rn(scale), magnitude >= 0x1p-60f && magnitude <= 0x1p60f};
  }

  __device__ __forceinline__ float quotient(float x) const {
    const float near = __fmul_rn(x, inverse);
    const float corrected = fmaf(fmaf(-near, scale, x), inverse, near);
    // Zeros keep their sign, and what is no number or far beyond any code stays that.
    return fabsf(near) < 0x1p40f ? copysignf(corrected, near) : near;
  }
};

template <class Scale>
__device__ __forceinline__ uint32_t code_of(float x, const Scale& by) {
  if (by.ordinary) return by.code(by.quotient(x));
  return by.scale == by.scale ? by.code(x / by.scale) : 0u;
}

// Codes of kVector neighbours, to a multiple of kVector bytes.
template <int kVector, class Scale>
__device__ __forceinline__ void store_codes(float (&x)[kVector], const Scale& by, uint8_t* codes) {
  if constexpr (kVector == 1) {
    *codes = static_cast<uint8_t>(code_of(x[0], by));
  } else {
    uint64_t packed = 0;
    if (by.ordinary) {
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        const uint64_t two = by.pair(by.quotient(x[i]), by.quotient(x[i + 1]));
        packed |= two << (8 * i);
      }
    } else {
      // Rare: a loop that is short to compile, in which all elements move on by one.
#pragma unroll 1
      for (int i = 0; i < kVector; ++i) {
        packed = packed >> 8 | static_cast<uint64_t>(code_of(x[0], by)) << 56;
#pragma unroll
        for (int j = 0; j + 1 < kVector; ++j) x[j] = x[j + 1];
      }
    }
    *reinterpret_cast<uint64_t*>(codes) = packed;
  }
}

}  // namespace effllm
