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

// The conversion saturates, infinity too, and makes NaN the code 0x7f.
__device__ __forceinline__ uint32_t e4m3_code(float x, float scale) {
  return scale == scale ? __nv_cvt_float_to_fp8(x / scale, __NV_SATFINITE, __NV_E4M3) : 0u;
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

// Their codes, to a multiple of kVector bytes.
template <int kVector>
__device__ __forceinline__ void store_codes(const float (&x)[kVector], float scale,
                                            uint8_t* codes) {
  uint64_t packed = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    packed |= static_cast<uint64_t>(e4m3_code(x[i], scale)) << (8 * i);
  }
  if constexpr (kVector == 1) {
    *codes = static_cast<uint8_t>(packed);
  } else {
    *reinterpret_cast<uint64_t*>(codes) = packed;
  }
}

// Whether rows of K elements at `x` may be loaded 8 at a time.
inline bool takes_vectors(const void* x, int64_t k) {
  return k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

}  // namespace effllm
