// In place of csrc/ptx/cvt.cuh.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace effllm::ptx {

template <class T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace effllm::ptx
