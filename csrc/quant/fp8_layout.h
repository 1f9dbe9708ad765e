// How numbers become e4m3 codes and scales, by the same arithmetic on every device.
//
// A scale is max|x| / 448 over the elements that share it, a true division, at least 2^-126 (or the
// quotients would be infinite), and 1 where all of them are 0. Codes round x / scale, again a true
// division, to nearest even and saturate at 448. Where NaN or infinity is among the elements the
// scale is NaN and all codes are 0: what sees them is NaN, and no NaN code is ever stored.
//
// Scales of activations are per row, or per "group" of 128 columns as DeepSeek-V3 has them
// (arXiv:2412.19437); those of weights per channel or per block of 128 x 128.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "common/dtype.h"

namespace effllm {

inline constexpr float kE4M3Max = 448.0f;
inline constexpr int64_t kFp8GroupSize = 128;
inline constexpr int32_t kInfinityBits = 0x7f800000;

// Bits of the largest |x|: magnitudes order as integers do, infinity and NaN above all others.
template <class T>
int32_t max_magnitude_bits(const T* row, int64_t dim) {
  int32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    largest = std::max(largest, std::bit_cast<int32_t>(to_float(row[d])) & 0x7fffffff);
  }
  return largest;
}

// The scale of elements with 8-bit codes up to `largest_code`.
inline float symmetric_scale(int32_t magnitude_bits, float largest_code) {
  if (magnitude_bits >= kInfinityBits) return std::numeric_limits<float>::quiet_NaN();
  // At least a normal number, or the quotients would be infinite.
  const float scale = std::bit_cast<float>(magnitude_bits) / largest_code;
  return magnitude_bits == 0 ? 1.0f : std::max(scale, std::numeric_limits<float>::min());
}

// Codes of a row by a scale that symmetric_scale gave.
template <class T>
void encode_e4m3(const T* row, int64_t dim, float scale, uint8_t* codes) {
  const bool finite = scale == scale;
  for (int64_t d = 0; d < dim; ++d) {
    codes[d] = from_float<float8_e4m3>(finite ? to_float(row[d]) / scale : 0.0f).bits;
  }
}

// What code that is the same for all 8-bit codes takes as a type.
struct E4M3Codes {
  static constexpr float kLargest = kE4M3Max;

  template <class T>
  static void encode(const T* row, int64_t dim, float scale, uint8_t* codes) {
    encode_e4m3(row, dim, scale, codes);
  }
};

}  // namespace effllm
