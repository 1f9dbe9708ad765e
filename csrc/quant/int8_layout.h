// How numbers become int8 codes and scales, by the same arithmetic on every device.
//
// As fp8_layout.h has it for e4m3, with max|x| / 127 for a scale: codes round x / scale, a true
// division, to nearest even. By a scale that is given they saturate at -128 and 127, and NaN, for
// which there is no code, is 0.
#pragma once

#include <bit>
#include <cstdint>

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
