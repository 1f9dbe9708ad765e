// Keeps products of weights and scales of values within float16, whatever the scales are.
#pragma once

#include <cstdint>

namespace effllm {

// The power of two that the largest scale a warp has seen lies under. Weights, which are below 2^8,
// times their scales and inverse() are below 2^15, and normal numbers down to 2^-29 of that; the
// output that they are summed up in lacks factor().
class ValueExponent {
 public:
  // `largest` of this lane's next scales, at least 0. The whole warp calls; if the result is true,
  // the output is to be multiplied by `factor`.
  __device__ __forceinline__ bool grow(float largest, float& factor) {
    // Magnitudes order as integers do; NaN stays above all and makes weights NaN.
    const uint32_t bits =
        __reduce_max_sync(~0u, max(__float_as_uint(largest), kSmallest) & 0x7f800000u);
    if (bits <= bits_) return false;
    factor = inverse(bits) * this->factor();
    bits_ = bits;
    return true;
  }

  __device__ __forceinline__ float inverse() const { return inverse(bits_); }
  __device__ __forceinline__ float factor() const { return 1.f / inverse(); }

 private:
  static constexpr uint32_t kSmallest = 32u << 23;  // 2^-95: below, powers would leave float

  // 2^7 / 2^(e + 1), for scales from 2^e to 2^(e + 1).
  static __device__ __forceinline__ float inverse(uint32_t bits) {
    return __uint_as_float((260u << 23) - bits);
  }

  uint32_t bits_ = kSmallest;
};

}  // namespace effllm
