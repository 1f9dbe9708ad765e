// The kernel of kv_append for caches in 8 or 4 bits: rows of k and v become codes and a word each.
//
// Roofline: bytes. A row is read twice, the second time from L1, and its codes are written once.
// The arithmetic is that of quant/kv_layout.h to the bit: every division is one.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>
#include <string>
#include <type_traits>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "kvcache/kv_append.h"

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

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kQuantizeLanes = 16;  // of a row: 8 elements each are D = 128

// Rows in the order [T, {k, v}, HKV]. `kVector` elements at a time: 8 in words of 16 bytes, or 2
// with addresses of any alignment.
template <class T, class Codec, int kVector>
__global__ void __launch_bounds__(kQuantizeThreads)
    kv_quantize_kernel(const __grid_constant__ KvAppendParams params) {
  using Encoder = KvEncoder<Codec>;
  constexpr int kRows = kQuantizeThreads / kQuantizeLanes;
  const int lane = threadIdx.x % kQuantizeLanes;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kQuantizeLanes;
  const int64_t token = row / (2 * params.num_kv_heads);
  const int64_t within_token = row % (2 * params.num_kv_heads);
  const int64_t head = within_token % params.num_kv_heads;
  const KvAppendRows& rows = within_token < params.num_kv_heads ? params.k : params.v;
  const int64_t slot = token < params.num_tokens ? params.slot_mapping[token] : -1;
  const bool valid = slot >= 0 && slot < params.num_slots;
  const int64_t page = valid ? slot / params.page_size : 0, offset = slot - page * params.page_size;
  // Rows without a slot stay for the shuffles, as rows of no elements.
  const auto dim = static_cast<int>(valid ? params.head_dim : 0);
  const auto* source = reinterpret_cast<const device_t<T>*>(
      rows.tokens + token * rows.stride_token_bytes + head * rows.stride_head_bytes);
  char* target = rows.cache + page * rows.stride_page_bytes + offset * rows.stride_slot_bytes +
                 head * rows.stride_cache_head_bytes;

  // Elements d .. d + kVector - 1; zeros past the end.
  const auto load = [&](int d, float (&x)[kVector]) {
    if constexpr (kVector == 8) {
      constexpr int kWords = 8 * sizeof(T) / sizeof(uint4);
      uint4 words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[i] = reinterpret_cast<const uint4*>(source + d)[i];
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[i] = device_to_float(reinterpret_cast<const device_t<T>*>(words)[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = d + i < dim ? device_to_float(source[d + i]) : 0.f;
    }
  };

  KvRowRange range;
  for (int d = lane * kVector; d < dim; d += kQuantizeLanes * kVector) {
    float x[kVector];
    load(d, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (kVector == 8 || d + i < dim) range.add(x[i]);
    }
  }
  range.reduce<kQuantizeLanes>();
  const Encoder encoder(range);
  if (valid && lane == 0) {
    const KvScales& scales = rows.scales;
    scales.words[page * scales.stride_page + offset * scales.stride_slot +
                 head * scales.stride_head] = encoder.word();
  }
  for (int d = lane * kVector; d < dim; d += kQuantizeLanes * kVector) {
    float x[kVector];
    load(d, x);
    uint64_t codes = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      codes |= static_cast<uint64_t>(encoder.code(x[i])) << (Encoder::kBits * i);
    }
    char* to = target + d * Encoder::kBits / 8;
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

template <class T, class Codec>
void launch_kv_quantize(const KvAppendParams& params, cudaStream_t stream) {
  const int64_t rows = 2 * params.num_tokens * params.num_kv_heads;
  const int64_t blocks = ceil_div<int64_t>(rows, kQuantizeThreads / kQuantizeLanes);
  if (blocks > INT32_MAX || params.head_dim > INT32_MAX / 8) {
    fail("kv_append", "2 * T * HKV must be below 2^35 and D below 2^28, got " +
                          std::to_string(rows) + " and " + std::to_string(params.head_dim));
  }
  const Launch launch{"kv_append", dim3(static_cast<unsigned>(blocks)), dim3(kQuantizeThreads), 0,
                      stream};
  if (params.word_bytes == 16) {
    launch(kv_quantize_kernel<T, Codec, 8>, params);
  } else {
    launch(kv_quantize_kernel<T, Codec, 2>, params);
  }
}

}  // namespace effllm
