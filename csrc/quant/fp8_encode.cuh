// What the kernels that make e4m3 codes share; the arithmetic is fp8_layout.h's to the bit.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>

#include "cuda/vec.cuh"
#include "quant/fp8_layout.h"

namespace effllm {

inline constexpr int kFp8Threads = 256;

__device__ __forceinline__ int32_t magnitude_bits(float x) {
  return __float_as_int(x) & 0x7fffffff;
}

__device__ __forceinline__ float e4m3_scale(int32_t largest_bits) {
  if (largest_bits >= kInfinityBits) return __int_as_float(0x7fc00000);
  if (largest_bits == 0) return 1.f;
  return fmaxf(__int_as_float(largest_bits) / kE4M3Max, FLT_MIN);
}

// Quotients by one scale. The compiler's division is a branch for each, which keeps them from
// overlapping; of a divisor that is known beforehand they are three operations: a product with its
// reciprocal, the exact remainder, and a correction that rounds to nearest (Markstein, IBM J. Res.
// Dev. 34, 1990; Brisebarre, Muller and Raina, IEEE Trans. Comput. 53, 2004).
struct E4m3Scale {
  float scale, inverse;
  bool ordinary;  // nothing that matters to a code underflows on the way

  static __device__ __forceinline__ E4m3Scale of(float scale) {
    const float magnitude = fabsf(scale);
    return {scale, __frcp_rn(scale), magnitude >= 0x1p-60f && magnitude <= 0x1p60f};
  }

  __device__ __forceinline__ float quotient(float x) const {
    const float near = __fmul_rn(x, inverse);
    const float corrected = fmaf(fmaf(-near, scale, x), inverse, near);
    // Zeros keep their sign, and what is no number or far beyond 448 stays that.
    return fabsf(near) < 0x1p40f ? copysignf(corrected, near) : near;
  }
};

// The conversion saturates, infinity too, and makes NaN the code 0x7f.
__device__ __forceinline__ uint32_t e4m3_code(float quotient) {
  return __nv_cvt_float_to_fp8(quotient, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint32_t e4m3_code(float x, const E4m3Scale& by) {
  if (by.ordinary) return e4m3_code(by.quotient(x));
  return by.scale == by.scale ? e4m3_code(x / by.scale) : 0u;
}

// The largest of all lanes of a block, in every lane. `warp_largest` must be free for use.
__device__ __forceinline__ int32_t block_max(int32_t value,
                                             int32_t (&warp_largest)[kFp8Threads / 32]) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = max(value, __shfl_xor_sync(~0u, value, lanes));
  }
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kFp8Threads / 32; ++warp) value = max(value, warp_largest[warp]);
  return value;
}

// kVector neighbours: 8, from a multiple of 16 bytes, or 1.
template <int kVector, class T>
__device__ __forceinline__ void load_floats(const T* from, float (&x)[kVector]) {
  if constexpr (kVector == 1) {
    x[0] = device_to_float(*from);
  } else {
    static_assert(kVector == 8);
    constexpr int kWords = 8 * sizeof(T) / sizeof(uint4);
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x[i] = device_to_float(reinterpret_cast<const T*>(words)[i]);
    }
  }
}

// Codes of kVector neighbours, to a multiple of kVector bytes.
template <int kVector>
__device__ __forceinline__ void store_codes(float (&x)[kVector], const E4m3Scale& by,
                                            uint8_t* codes) {
  if constexpr (kVector == 1) {
    *codes = static_cast<uint8_t>(e4m3_code(x[0], by));
  } else {
    uint64_t packed = 0;
    if (by.ordinary) {
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        const float2 pair{by.quotient(x[i]), by.quotient(x[i + 1])};
        const uint64_t two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
        packed |= two << (8 * i);
      }
    } else {
      // Rare: a loop that is short to compile, in which all elements move on by one.
#pragma unroll 1
      for (int i = 0; i < kVector; ++i) {
        packed = packed >> 8 | static_cast<uint64_t>(e4m3_code(x[0], by)) << 56;
#pragma unroll
        for (int j = 0; j + 1 < kVector; ++j) x[j] = x[j + 1];
      }
    }
    *reinterpret_cast<uint64_t*>(codes) = packed;
  }
}

// Whether rows of K elements at `x` may be loaded 8 at a time.
inline bool takes_vectors(const void* x, int64_t k) {
  return k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

}  // namespace effllm
