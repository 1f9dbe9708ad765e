// 4- and 8-bit codes into 16-bit floats in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "cuda/vec.cuh"
#include "ptx/cvt.cuh"
#include "ptx/lop3.cuh"
#include "ptx/prmt.cuh"
#include "quant/kv_layout.h"
#include "quant/lut4_layout.h"

namespace effllm {

// Four code pairs of a packed word, each beside the upper bits that make a 16-bit float of it:
// 1024 + q in fp16, 128 + q in bf16.
template <class T>
__device__ __forceinline__ uint32_t biased_codes(uint32_t word, int pair) {
  constexpr uint32_t kBits = std::is_same_v<T, float16> ? 0x64006400u : 0x43004300u;
  return ptx::and_or(word >> (4 * pair), 0x000f000fu, kBits);
}

// Codes less a zero point, which is kept as the pair of floats that is subtracted. Everything here
// is exact: codes are 0..15, zero points 0..255, and the differences are integers of 8 bits.
template <class T>
struct Int4Dequant;

template <>
struct Int4Dequant<float16> {
  using Pair = __half2;

  // 0x6400 | q is the half 1024 + q; so is the zero point's, and the difference needs no fix-up.
  template <bool kSymmetric = false>
  static __device__ __forceinline__ Pair zero_pair(int zero) {
    return __half2half2(__ushort_as_half(static_cast<uint16_t>(0x6400 | zero)));
  }

  template <bool kSymmetric = false>
  static __device__ __forceinline__ uint32_t codes(uint32_t word, int pair, Pair zero) {
    const uint32_t biased = biased_codes<float16>(word, pair);
    const Pair value = __hsub2(reinterpret_cast<const Pair&>(biased), zero);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

template <>
struct Int4Dequant<bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr int kBias = 128;

  template <bool kSymmetric = false>
  static __device__ __forceinline__ Pair zero_pair(int zero) {
    // 0x4300 | z is 128 + z up to 127.
    if (kSymmetric) {
      return __bfloat162bfloat162(__ushort_as_bfloat16(static_cast<uint16_t>(0x4300 | zero)));
    }
    return __bfloat162bfloat162(__int2bfloat16_rn(zero));
  }

  // 128 + 255 would not be exact, hence two subtractions, but for the zero point 8.
  template <bool kSymmetric = false>
  static __device__ __forceinline__ uint32_t codes(uint32_t word, int pair, Pair zero) {
    const uint32_t biased = biased_codes<bfloat16>(word, pair);
    Pair value = reinterpret_cast<const Pair&>(biased);
    if (!kSymmetric) value = __hsub2(value, __bfloat162bfloat162(__int2bfloat16_rn(kBias)));
    value = __hsub2(value, zero);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

// An octet, 8 neighbouring elements of a cache row, as the four pairs that mma takes: elements d
// and d + kPairDistance. `Kv` is the element of the cache, or the codec of a quantised one, whose
// codes come as exact float16, less the zero that bias() knows. An element is a code times scale().
template <class Kv>
struct KvOctet {
  using Operand = Kv;
  struct Bias {};
  static constexpr int kWords = 4, kPairDistance = 1;

  static __device__ __forceinline__ void decode(const uint32_t* words, Bias, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = words[i];
  }
};

template <>
struct KvOctet<KvE4M3> {
  using Operand = float16;
  struct Bias {};
  static constexpr int kWords = 2, kPairDistance = 1;

  static __device__ __forceinline__ float scale(uint32_t word) {
    return __uint_as_float(word) * ptx::e4m3_factor();
  }
  static __device__ __forceinline__ Bias bias(uint32_t) { return {}; }

  static __device__ __forceinline__ void decode(const uint32_t* words, Bias, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = ptx::half_pair_from_e4m3(i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16);
    }
  }
};

template <>
struct KvOctet<KvInt8> {
  using Operand = float16;
  struct Bias {};
  static constexpr int kWords = 2, kPairDistance = 1;

  static __device__ __forceinline__ float scale(uint32_t word) { return __uint_as_float(word); }
  static __device__ __forceinline__ Bias bias(uint32_t) { return {}; }

  // 0x6400 | (x + 128) is the half 1024 + 128 + x.
  static __device__ __forceinline__ void decode(const uint32_t* words, Bias, uint32_t (&pairs)[4]) {
    const __half2 offset = __half2half2(__ushort_as_half(0x6480));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t shifted = words[i / 2] ^ 0x80808080u;
      const uint32_t biased = ptx::Permute()(shifted, 0x64646464u, i % 2 == 0 ? 0x4140 : 0x4342);
      const __half2 value = __hsub2(reinterpret_cast<const __half2&>(biased), offset);
      pairs[i] = reinterpret_cast<const uint32_t&>(value);
    }
  }
};

template <>
struct KvOctet<KvInt4> {
  using Operand = float16;
  using Bias = __half2;  // 1024 + zero, twice
  static constexpr int kWords = 1, kPairDistance = 4;

  static __device__ __forceinline__ float scale(uint32_t word) {
    return __low2float(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ Bias bias(uint32_t word) {
    const __half2 zero = __high2half2(reinterpret_cast<const __half2&>(word));
    return __hadd2(zero, __half2half2(__ushort_as_half(0x6400)));
  }

  static __device__ __forceinline__ void decode(const uint32_t* words, Bias bias,
                                                uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = Int4Dequant<float16>::codes(words[0], i, bias);
  }

  // For kernels that take what is too much off their sums: 1 + kStep * code for each code at the
  // place `idx` (0 .. 3) of a half word, and the same of the zero.
  static constexpr float kStep = 1.f / 64;

  static __device__ __forceinline__ uint32_t steps(uint32_t word, int idx) {
    const uint32_t shifted = idx == 0 ? word << 4 : word >> (4 * idx - 4);
    return ptx::and_or(shifted, 0x00f000f0u, 0x3c003c00u);
  }
  static __device__ __forceinline__ float zero_steps(uint32_t word) {
    return 1.f + kStep * __high2float(reinterpret_cast<const __half2&>(word));
  }
};

// Whole weights (q - zero) * scale of one row and group, rounded once to T: `kExact` says that the
// scale itself is a T; else what T cannot hold of it is added by a second product.
//
// With u = q + bias - sub, both exact, a weight is u * scale + add. `add` is 0, or -scale for odd
// zero points from 129 on, to which no bfloat16 `sub` can be near enough.
template <class T, bool kExact>
struct ScaledInt4 {
  using Native = device_t<T>;
  using Pair = std::conditional_t<std::is_same_v<T, float16>, __half2, __nv_bfloat162>;
  static constexpr int kBias = std::is_same_v<T, float16> ? 1024 : 128;
  static constexpr bool kHasAdd = std::is_same_v<T, bfloat16>;

  // As it travels through shared memory: {scale, its rest}, {sub, add}.
  static __device__ __forceinline__ uint2 encode(float scale, int zero) {
    const int odd = kHasAdd && zero > kBias ? zero % 2 : 0;
    const float high = device_to_float(device_from_float<Native>(scale));
    return {ptx::pack_pair<T>(high, kExact ? 0.0f : scale - high),
            ptx::pack_pair<T>(static_cast<float>(kBias + zero - odd), odd ? -high : -0.0f)};
  }

  __device__ __forceinline__ void decode(uint2 encoded) {
    scale = both(encoded.x, 0x1010);
    if constexpr (!kExact) rest = both(encoded.x, 0x3232);
    sub = both(encoded.y, 0x1010);
    if constexpr (kHasAdd) add = both(encoded.y, 0x3232);
  }

  __device__ __forceinline__ uint32_t weights(uint32_t word, int pair) const {
    const uint32_t biased = biased_codes<T>(word, pair);
    const Pair u = __hsub2(reinterpret_cast<const Pair&>(biased), sub);
    Pair value;
    if constexpr (kExact && kHasAdd) {
      value = __hfma2(u, scale, add);
    } else if constexpr (kExact) {
      value = __hmul2(u, scale);
    } else if constexpr (kHasAdd) {
      value = __hfma2(u, scale, __hfma2(u, rest, add));
    } else {
      value = __hfma2(u, scale, __hmul2(u, rest));
    }
    return reinterpret_cast<const uint32_t&>(value);
  }

  static __device__ __forceinline__ Pair both(uint32_t pair, uint32_t selector) {
    const uint32_t twice = ptx::Permute()(pair, 0, selector);
    return reinterpret_cast<const Pair&>(twice);
  }

  Pair scale, rest, sub, add;
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
  // sm_80 and sm_90), where Int4Dequant takes 11 in fp16 and 15 in bf16.
  static __device__ __forceinline__ void fragment(uint32_t word, const Lut4Planes& upper,
                                                  const Lut4Planes& lower, uint32_t (&a)[4]) {
    lut4_look_up(word, upper, lower, ptx::Permute(), a);
  }
};

// Two e4m3 of a word, those that `which` says, kLowPair or kHighPair, as exact 16-bit floats that
// times kFactor are their values; NaN is NaN.
template <class T>
struct E4M3Dequant;

template <>
struct E4M3Dequant<float16> {
  static constexpr float kFactor = ptx::e4m3_factor();
  static constexpr uint32_t kLowPair = 0, kHighPair = 16;

  static __device__ __forceinline__ uint32_t pair(uint32_t codes, uint32_t which = kLowPair) {
    const uint32_t halves = ptx::half_pair_from_e4m3(codes >> which);
    if constexpr (kFactor == 1.f) return halves;
    // One more than the magnitude of NaN is the last bit that an exponent of NaN lacks.
    return halves | (((halves & 0x3f803f80u) + 0x00800080u) & 0x40004000u);
  }
};

template <>
struct E4M3Dequant<bfloat16> {
  static constexpr float kFactor = 1.f;
  static constexpr uint32_t kLowPair = 0x9180, kHighPair = 0xb3a2;  // a code below eight signs

  // The magnitude, four bits to the right of bfloat16's, counts for 2^120 less.
  static __device__ __forceinline__ uint32_t pair(uint32_t codes, uint32_t which = kLowPair) {
    const uint32_t small = ptx::Permute()(codes, 0, which) << 4 & 0x87f087f0u;
    // Likewise: the exponent of NaN is this bit and the three above it as well.
    const uint32_t nan = (small + 0x00100010u) & 0x08000800u;
    const uint32_t bits = small + 15 * nan;
    const __nv_bfloat162 power = __bfloat162bfloat162(__ushort_as_bfloat16(0x7b80));  // 2^120
    const __nv_bfloat162 value = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits), power);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

// Likewise two int8.
template <class T>
struct Int8Dequant;

template <>
struct Int8Dequant<float16> {
  static constexpr float kFactor = 1.f;
  static constexpr uint32_t kLowPair = 0x4140, kHighPair = 0x4342;

  // 1024 + 128 + code, less 1152.
  static __device__ __forceinline__ uint32_t pair(uint32_t codes, uint32_t which = kLowPair) {
    const uint32_t biased = ptx::Permute()(codes ^ 0x80808080u, 0x64646464u, which);
    const __half2 offset = __half2half2(__ushort_as_half(0x6480));
    const __half2 value = __hsub2(reinterpret_cast<const __half2&>(biased), offset);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

template <>
struct Int8Dequant<bfloat16> {
  static constexpr float kFactor = 64.f;
  static constexpr uint32_t kLowPair = 0x4140, kHighPair = 0x4342;

  // Subnormals and the smallest exponent together hold 2^-133 times 0 .. 255. 128 + code of them
  // times 2^127, the largest power there is, less 128 / 64.
  static __device__ __forceinline__ uint32_t pair(uint32_t codes, uint32_t which = kLowPair) {
    const uint32_t tiny = ptx::Permute()(codes ^ 0x80808080u, 0, which);
    const __nv_bfloat162 power = __bfloat162bfloat162(__ushort_as_bfloat16(0x7f00));
    const __nv_bfloat162 offset = __bfloat162bfloat162(__ushort_as_bfloat16(0xc000));
    const __nv_bfloat162 value =
        __hfma2(reinterpret_cast<const __nv_bfloat162&>(tiny), power, offset);
    return reinterpret_cast<const uint32_t&>(value);
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
