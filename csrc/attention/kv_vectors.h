// Rows of a KV cache as vectors of floats, straight from the cache's bytes.
//
// A row comes in pairs of vectors: the vector `idx` of its first half and that of its second. For
// int4 these are elements 2 i and 2 i + 1, the low and the high nibbles of the same bytes: the
// order of elements within rows means nothing to attention as long as queries, keys, values and
// sums share it. What is left of the codec (a scale, a power of two) multiplies scores and weights.
//
// Internal linkage throughout: see common/vector.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/vector.h"
#include "common/vector_convert.h"
#include "quant/kv_layout.h"

namespace effllm {
namespace {

// `kBits` of one element; `kPower`: what an element of the row is, divided by what `vector` gives
// for it, but for the scale.
template <class Kv>
struct KvVectors;

template <>
struct KvVectors<float> {
  static constexpr int kBits = 32;
  static constexpr float kPower = 1.0f;
  template <int kWidth>
  static FloatVector<kWidth> vector(const void* row, int64_t idx) {
    return load_once<FloatVector<kWidth>>(static_cast<const float*>(row) + idx * kWidth);
  }
};

template <>
struct KvVectors<bfloat16> {
  static constexpr int kBits = 16;
  static constexpr float kPower = 1.0f;
  template <int kWidth>
  static FloatVector<kWidth> vector(const void* row, int64_t idx) {
    return reinterpret_cast<FloatVector<kWidth>>(
        widen<kWidth>(static_cast<const uint16_t*>(row) + idx * kWidth) << 16);
  }
};

template <>
struct KvVectors<float16> {
  static constexpr int kBits = 16;
  static constexpr float kPower = 1.0f;
  template <int kWidth>
  static FloatVector<kWidth> vector(const void* row, int64_t idx) {
    const auto* from = static_cast<const uint16_t*>(row) + idx * kWidth;
#if defined(__AVX512F__)
    if constexpr (kWidth == 16) {
      return reinterpret_cast<FloatVector<kWidth>>(
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
    }
#endif
    using Float = FloatVector<kWidth>;
    using Int = Vector<int32_t, kWidth>;
    const Int bits = widen<kWidth>(from);
    const Float scaled = shift_and_scale<kWidth>(bits, 13, 0x0fffe000, 0x1p112f);
    const Int magnitude = bits & 0x7fff;
    const Int inf_or_nan = (magnitude >= 0x7c00) & 0x7f800000;
    return reinterpret_cast<Float>(reinterpret_cast<Int>(scaled) | inf_or_nan |
                                   (bits & 0x8000) << 16);
  }
};

template <>
struct KvVectors<KvE4M3> {
  // No NaN code is ever stored.
  static constexpr int kBits = 8;
  static constexpr float kPower = kE4M3VectorPower;
  template <int kWidth>
  static FloatVector<kWidth> vector(const void* row, int64_t idx) {
    return e4m3_vector<kWidth>(static_cast<const uint8_t*>(row) + idx * kWidth);
  }
};

template <>
struct KvVectors<KvInt8> {
  static constexpr int kBits = 8;
  static constexpr float kPower = 1.0f;
  template <int kWidth>
  static FloatVector<kWidth> vector(const void* row, int64_t idx) {
    return __builtin_convertvector(widen<kWidth>(static_cast<const int8_t*>(row) + idx * kWidth),
                                   FloatVector<kWidth>);
  }
};

template <>
struct KvVectors<KvInt4> {
  static constexpr int kBits = 4;
  static constexpr float kPower = 1.0f;
};

// Vectors `idx` of a row's two halves, of `half` vectors each, into `pair`.
template <class Kv, int kWidth>
inline void load_pair(const void* row, int64_t idx, int64_t half, float zero,
                      FloatVector<kWidth> (&pair)[2]) {
  using Float = FloatVector<kWidth>;
  if constexpr (requires { KvVectors<Kv>::template vector<kWidth>(row, idx); }) {
    pair[0] = KvVectors<Kv>::template vector<kWidth>(row, idx);
    pair[1] = KvVectors<Kv>::template vector<kWidth>(row, half + idx);
  } else {
    const auto bytes = widen<kWidth>(static_cast<const uint8_t*>(row) + idx * kWidth);
    pair[0] = __builtin_convertvector(bytes & 15, Float) - zero;
    pair[1] = __builtin_convertvector(bytes >> 4, Float) - zero;
  }
}

}  // namespace
}  // namespace effllm
