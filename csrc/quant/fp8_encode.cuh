// What the kernels that make e4m3 codes share; the arithmetic is fp8_layout.h's to the bit.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/vec.cuh"
#include "quant/code_scale.cuh"
#include "quant/fp8_layout.h"

namespace effllm {

inline constexpr int kFp8Threads = 256;

struct E4m3Scale : CodeScale {
  static constexpr float kLargest = kE4M3Max;

  static __device__ __forceinline__ E4m3Scale of(float scale) { return {CodeScale::of(scale)}; }

  // The conversion saturates, infinity too, and makes NaN the code 0x7f.
  static __device__ __forceinline__ uint32_t code(float quotient) {
    return __nv_cvt_float_to_fp8(quotient, __NV_SATFINITE, __NV_E4M3);
  }

  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
  }
};

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

// Whether rows of K elements at `x` may be loaded 8 at a time.
inline bool takes_vectors(const void* x, int64_t k) {
  return k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

}  // namespace effllm
