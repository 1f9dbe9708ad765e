// Rows of k and v in the registers of some lanes, and their codes in 8 or 4 bits: what kernels that
// append to a cache are made of. The arithmetic is that of quant/kv_layout.h to the bit: every
// division is one.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "cuda/vec.cuh"
#include "kvcache/kv_append.h"
#include "quant/kv_layout.h"

namespace effllm {

// What one lane, in the end the row's lanes together, has seen of a row.
struct KvRowRange {
  int32_t magnitude_bits = 0;  // of the largest |x|: NaN and infinity are above all others
  float low = FLT_MAX, high = -FLT_MAX;

  __device__ __forceinline__ void add(float x) {
    magnitude_bits = max(magnitude_bits, __float_as_int(x) & 0x7fffffff);
    low = fminf(low, x);
    high = fmaxf(high, x);
  }

  template <int kLanes>
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      magnitude_bits = max(magnitude_bits, __shfl_xor_sync(~0u, magnitude_bits, lanes));
      low = fminf(low, __shfl_xor_sync(~0u, low, lanes));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, lanes));
    }
  }

  __device__ __forceinline__ bool finite() const { return magnitude_bits < kInfinityBits; }
};

// The word of a row, and the codes of its elements.
template <class Codec>
struct KvEncoder {
  static constexpr int kBits = 8;
  static constexpr float kLargest = std::is_same_v<Codec, KvE4M3> ? kE4M3Max : kInt8Max;

  __device__ __forceinline__ explicit KvEncoder(const KvRowRange& range)
      : finite(range.finite()), scale(1.f) {
    const float quotient = __int_as_float(range.magnitude_bits) / kLargest;
    if (range.magnitude_bits != 0) scale = fmaxf(quotient, FLT_MIN);
  }

  __device__ __forceinline__ uint32_t word() const {
    return finite ? __float_as_uint(scale) : 0x7fc00000u;
  }

  __device__ __forceinline__ uint32_t code(float x) const {
    const float steps = fminf(fmaxf(finite ? x / scale : 0.f, -kLargest), kLargest);
    if constexpr (std::is_same_v<Codec, KvE4M3>) {
      return __nv_cvt_float_to_fp8(steps, __NV_SATFINITE, __NV_E4M3);
    } else {
      return static_cast<uint32_t>(__float2int_rn(steps)) & 0xffu;
    }
  }

  bool finite;
  float scale;
};

template <>
struct KvEncoder<KvInt4> {
  static constexpr int kBits = 4;

  __device__ __forceinline__ explicit KvEncoder(const KvRowRange& range) : finite(range.finite()) {
    const float low = bounded(range.low), high = bounded(range.high);
    const float least = fmaxf(fmaxf(high, -low) / kInt4MaxZero, kInt4MinScale);
    const __half half_scale = __float2half_rn(fmaxf((high - low) / 15.f, least));
    scale = __half2float(half_scale);
    zero = fminf(fmaxf(-rintf(low / scale), -kInt4MaxZero), kInt4MaxZero);
    const __half half_zero = __float2half_rn(zero);
    halves = __half_as_ushort(half_scale) | static_cast<uint32_t>(__half_as_ushort(half_zero))
                                                << 16;
  }

  __device__ __forceinline__ uint32_t word() const { return finite ? halves : 0x7e007e00u; }

  __device__ __forceinline__ uint32_t code(float x) const {
    const float steps = rintf(bounded(x) / scale) + zero;
    return finite ? static_cast<uint32_t>(fminf(fmaxf(steps, 0.f), 15.f)) : 0u;
  }

  static __device__ __forceinline__ float bounded(float x) {
    return fminf(fmaxf(x, -kFloat16Max), kFloat16Max);
  }

  bool finite;
  float scale, zero;
  uint32_t halves;
};

inline constexpr int kRowLanes = 16;  // of a row: 8 elements each are D = 128

// Elements of a row: 8 in words of 16 bytes, or 2 at addresses of any alignment.
template <class T, int kVector>
struct RowVector {
  static_assert(kVector == 8 || kVector == 2);
  device_t<T> at[kVector];

  // Elements d .. d + kVector - 1; zeros past the end.
  static __device__ __forceinline__ RowVector load(const device_t<T>* row, int d, int dim) {
    RowVector x;
    if constexpr (kVector == 8) {
      constexpr int kWords = sizeof(RowVector) / sizeof(uint4);
      uint4 words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(row + d)[i];
#pragma unroll
      for (int i = 0; i < kVector; ++i) x.at[i] = reinterpret_cast<const device_t<T>*>(words)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x.at[i] = d + i < dim ? row[d + i] : device_from_float<device_t<T>>(0.f);
      }
    }
    return x;
  }

  __device__ __forceinline__ void store(device_t<T>* row, int d, int dim) const {
    if constexpr (kVector == 8) {
      constexpr int kWords = sizeof(RowVector) / sizeof(uint4);
      uint4 words[kWords];
#pragma unroll
      for (int i = 0; i < kVector; ++i) reinterpret_cast<device_t<T>*>(words)[i] = at[i];
#pragma unroll
      for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(row + d)[i] = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (d + i < dim) row[d + i] = at[i];
      }
    }
  }
};

// Writes the codes of a row of `dim` elements and its word; load(d) gives its elements from d on.
// The lanes of a warp call it together, those without a row with dim = 0.
template <class Codec, int kVector, class Load>
__device__ __forceinline__ void quantize_row(int lane, int dim, const KvRowTarget& target,
                                             const Load& load) {
  using Encoder = KvEncoder<Codec>;
  KvRowRange range;
  for (int d = lane * kVector; d < dim; d += kRowLanes * kVector) {
    const auto x = load(d);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (kVector == 8 || d + i < dim) range.add(device_to_float(x.at[i]));
    }
  }
  range.reduce<kRowLanes>();
  const Encoder encoder(range);
  if (dim > 0 && lane == 0) *target.word = encoder.word();
  for (int d = lane * kVector; d < dim; d += kRowLanes * kVector) {
    const auto x = load(d);
    uint64_t codes = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      codes |= static_cast<uint64_t>(encoder.code(device_to_float(x.at[i])))
               << (Encoder::kBits * i);
    }
    char* to = target.row + d * Encoder::kBits / 8;
    if constexpr (kVector == 8 && Encoder::kBits == 8) {
      *reinterpret_cast<uint64_t*>(to) = codes;
    } else if constexpr (kVector == 8) {
      *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(codes);
    } else {
      to[0] = static_cast<char>(codes);
      if (Encoder::kBits == 8 && d + 1 < dim) to[1] = static_cast<char>(codes >> 8);
    }
  }
}

}  // namespace effllm
