// How numbers become int8 codes and scales, by the same arithmetic on every device.
//
// As fp8_layout.h has it for e4m3, with max|x| / 127 for a scale: codes round x / scale, a true
// division, to nearest even. By a scale that is given they saturate at -128 and 127, and NaN, for
// which there is no code, is 0.
//
// Asymmetric codes of a row use all 256 of them for its range, widened to hold 0, for which one
// stands, its zero point:
//
//   scale  (max - min) / 255, at least 2^-126; 1 where all is 0; NaN beside NaN or infinity
//   zero   round(-min / scale) - 128; 0 where the scale is 1 or NaN by those rules
//   code   round(x / scale) + zero, bounded by -128 and 127; 0 by the scale NaN
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "quant/fp8_layout.h"

namespace effllm {

inline constexpr float kInt8Max = 127.0f;

inline uint8_t int8_code(float quotient) {
  const float low = quotient > -128.0f ? quotient : -128.0f;
  const float bounded = quotient == quotient ? (low < 127.0f ? low : 127.0f) : 0.0f;
  // 1.5 * 2^23 has the ulp 1: adding it rounds, and leaves the code in the last byte.
  return static_cast<uint8_t>(std::bit_cast<uint32_t>(bounded + 0x1.8p23f));
}

// The nearest integer, of two the even one, of less than 2^22.
inline int32_t nearest_int(float value) {
  constexpr float kOne = 0x1.8p23f;  // a float whose ulp is 1
  return std::bit_cast<int32_t>(value + kOne) - std::bit_cast<int32_t>(kOne);
}

// How far a row reaches on both sides of 0: bits of the magnitudes, which order as integers do,
// infinity and NaN above all others.
struct Int8Range {
  int32_t positive, negative;
};

template <class T>
Int8Range int8_range(const T* row, int64_t dim) {
  Int8Range range{0, 0};
  for (int64_t d = 0; d < dim; ++d) {
    const int32_t bits = std::bit_cast<int32_t>(to_float(row[d]));
    range.positive = std::max(range.positive, bits);
    range.negative = std::max(range.negative, bits ^ std::numeric_limits<int32_t>::min());
  }
  return range;
}

struct AsymmetricInt8Codes {
  float scale;
  int32_t zero;

  static AsymmetricInt8Codes of(Int8Range range) {
    const int32_t largest = std::max(range.positive, range.negative);
    if (largest >= kInfinityBits) return {std::numeric_limits<float>::quiet_NaN(), 0};
    if (largest == 0) return {1.0f, 0};
    const float high = std::bit_cast<float>(range.positive);
    const float low = std::bit_cast<float>(range.negative);
    // Halves: their sum is finite, and exact but for rounding it once. Those of subnormal numbers
    // are not, where the scale is the smallest anyhow.
    const float scale =
        std::max((high * 0.5f + low * 0.5f) / 127.5f, std::numeric_limits<float>::min());
    return {scale, nearest_int(low / scale) - 128};
  }

  template <class T>
  void encode(const T* row, int64_t dim, uint8_t* codes) const {
    const bool is_number = scale == scale;
    for (int64_t d = 0; d < dim; ++d) {
      const int32_t code = nearest_int(is_number ? to_float(row[d]) / scale : 0.0f) + zero;
      codes[d] = static_cast<uint8_t>(std::clamp(code, -128, 127));
    }
  }
};

// Codes of a row by a scale that symmetric_scale gave, or any other.
struct Int8Codes {
  static constexpr float kLargest = kInt8Max;

  template <class T>
  static void encode(const T* row, int64_t dim, float scale, uint8_t* codes) {
    const bool is_number = scale == scale;
    for (int64_t d = 0; d < dim; ++d) {
      codes[d] = int8_code(is_number ? to_float(row[d]) / scale : 0.0f);
    }
  }
};

}  // namespace effllm
