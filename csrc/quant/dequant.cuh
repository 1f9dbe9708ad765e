// 4-bit codes into 16-bit floats in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"
#include "ptx/cvt.cuh"
#include "ptx/prmt.cuh"
#include "quant/lut4_layout.h"

namespace effllm {

// A pair of equal zero points as the float type's own numbers, to be subtracted from code pairs.
// Everything here is exact: codes are 0..15, zero points 0..255, and the differences are integers
// of at most 8 bits.
template <class T>
struct Int4Dequant;

template <>
struct Int4Dequant<float16> {
  using Pair = __half2;

  // 0x6400 | q is the half 1024 + q; so is the zero point's, and the difference needs no fix-up.
  static __device__ __forceinline__ Pair zero_pair(int zero) {
    return __half2half2(__ushort_as_half(static_cast<uint16_t>(0x6400 | zero)));
  }

  static __device__ __forceinline__ uint32_t codes(uint32_t word, int pair, Pair zero) {
    const uint32_t biased = ((word >> (4 * pair)) & 0x000f000fu) | 0x64006400u;
    const Pair value = __hsub2(reinterpret_cast<const Pair&>(biased), zero);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

template <>
struct Int4Dequant<bfloat16> {
  using Pair = __nv_bfloat162;

  static __device__ __forceinline__ Pair zero_pair(int zero) {
    return __bfloat162bfloat162(__int2bfloat16_rn(zero));
  }

  // 0x4300 | q is the bfloat16 128 + q. 128 + 255 would not be exact, hence two subtractions.
  static __device__ __forceinline__ uint32_t codes(uint32_t word, int pair, Pair zero) {
    const uint32_t biased = ((word >> (4 * pair)) & 0x000f000fu) | 0x43004300u;
    const Pair bias = __bfloat162bfloat162(__ushort_as_bfloat16(0x4300));
    const Pair value = __hsub2(__hsub2(reinterpret_cast<const Pair&>(biased), bias), zero);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

// Values of a codebook, rounded to T where its planes are made. Nothing else is rounded.
template <class T>
struct Lut4Dequant {
  // Word `idx` of both planes, of entries 4 idx .. 4 idx + 3.
  static __device__ __forceinline__ void plane_words(const float (&entries)[4], uint32_t& low,
                                                     uint32_t& high) {
    const uint32_t first = ptx::pack_pair<T>(entries[0], entries[1]);
    const uint32_t second = ptx::pack_pair<T>(entries[2], entries[3]);
    low = ptx::Permute()(first, second, 0x6420);
    high = ptx::Permute()(first, second, 0x7531);
  }

  // lut4_look_up with prmt: 25 instructions for 8 weights (14 PRMT, 8 LOP3, 3 shifts; nvcc 13.0,
  // sm_80 and sm_90), where Int4Dequant takes 15 in fp16 and 19 in bf16.
  static __device__ __forceinline__ void fragment(uint32_t word, const Lut4Planes& upper,
                                                  const Lut4Planes& lower, uint32_t (&a)[4]) {
    lut4_look_up(word, upper, lower, ptx::Permute(), a);
  }
};

// Zero in the columns past K of an A fragment, for weights that may be no numbers there: 0 * NaN is
// NaN. This lane's first column is `columns_left` before K.
__device__ __forceinline__ void zero_past_k(uint32_t (&a)[4], int64_t columns_left) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t left = columns_left - 8 * (j / 2);
    a[j] &= left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0u;
  }
}

}  // namespace effllm
