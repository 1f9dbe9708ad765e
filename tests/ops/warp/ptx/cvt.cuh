// Conversions of warp::run, in place of csrc/ptx/cvt.cuh.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace effllm::ptx {

template <class T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

inline uint32_t half_pair_from_e4m3(uint32_t pair) {
  const uint32_t bytes = (pair & 0xff) << 8 | (pair & 0xff00) << 16;
  return (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u);
}

constexpr float e4m3_factor() { return 256.f; }

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace effllm::ptx
