// Vectors of integers and small floats as 32-bit ones. Internal linkage throughout: see vector.h.
#pragma once

#include <cstdint>

#include "common/vector.h"

#if defined(__AVX2__)
#include "common/x86_intrinsics.h"
#endif

namespace effllm {
namespace {

// kWidth integers as 32-bit ones. Intrinsics: compilers take vector conversions apart.
template <int kWidth, class T>
inline Vector<int32_t, kWidth> widen(const T* from) {
  using Int = Vector<int32_t, kWidth>;
#if defined(__AVX512F__)
  if constexpr (kWidth == 16 && sizeof(T) == 1) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Int>(T(-1) < T(0) ? _mm512_cvtepi8_epi32(bytes)
                                              : _mm512_cvtepu8_epi32(bytes));
  } else if constexpr (kWidth == 16) {
    return reinterpret_cast<Int>(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  } else
#endif
#if defined(__AVX2__)
      if constexpr (kWidth == 8 && sizeof(T) == 1) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Int>(T(-1) < T(0) ? _mm256_cvtepi8_epi32(bytes)
                                              : _mm256_cvtepu8_epi32(bytes));
  } else if constexpr (kWidth == 8) {
    return reinterpret_cast<Int>(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  } else
#endif
  {
    Int wide;
    for (int idx = 0; idx < kWidth; ++idx) wide[idx] = from[idx];
    return wide;
  }
}

// Floats whose bits, shifted, are those of a shorter format with a sign above `magnitude_bits`:
// 2^kBias is what the exponent biases differ by, and the product is exact, also for subnormals.
template <int kWidth>
inline FloatVector<kWidth> shift_and_scale(Vector<int32_t, kWidth> bits, int shift, int32_t mask,
                                           float power) {
  return reinterpret_cast<FloatVector<kWidth>>((bits << shift) & mask) * power;
}

// What an e4m3 is, divided by what e4m3_vector gives for it.
inline constexpr float kE4M3VectorPower = 0x1p8f;

// kWidth of them, as the float16 of the same bits, 2^8 times smaller. With `kNan` the NaN codes are
// NaN; without they are 480, for bytes that are known to have none.
template <int kWidth, bool kNan = false>
inline FloatVector<kWidth> e4m3_vector(const uint8_t* from) {
  using Float = FloatVector<kWidth>;
  using Int = Vector<int32_t, kWidth>;
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) {
    const __m256i halves =
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    __m256i bits =
        _mm256_and_si256(_mm256_slli_epi16(halves, 7), _mm256_set1_epi16(int16_t(0xbf80)));
    if constexpr (kNan) {
      // One more than the magnitude of NaN is the last bit that an exponent of NaN lacks.
      const __m256i next = _mm256_add_epi16(bits, _mm256_set1_epi16(0x0080));
      constexpr int kOrAnd = 0xf8;  // bits | (next & 0x4000)
      bits = _mm256_ternarylogic_epi32(bits, next, _mm256_set1_epi16(0x4000), kOrAnd);
    }
    return reinterpret_cast<Float>(_mm512_cvtph_ps(bits));
  }
#endif
  const Int bytes = widen<kWidth>(reinterpret_cast<const int8_t*>(from));
  const Float values = shift_and_scale<kWidth>(bytes, 20, int32_t(0x87f00000), 0x1p112f);
  if constexpr (!kNan) return values;
  const Int nan = ((bytes & 0x7f) == 0x7f) & 0x7fc00000;
  return reinterpret_cast<Float>(reinterpret_cast<Int>(values) | nan);
}

// kWidth int8 as floats.
template <int kWidth>
inline FloatVector<kWidth> int8_vector(const uint8_t* from) {
  const auto bytes = widen<kWidth>(reinterpret_cast<const int8_t*>(from));
  return __builtin_convertvector(bytes, FloatVector<kWidth>);
}

}  // namespace
}  // namespace effllm
