// Bytes picked by warp::run, in place of csrc/ptx/prmt.cuh.
#pragma once

#include <cstdint>

namespace effllm::ptx {

struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    const uint64_t bytes = a | uint64_t{b} << 32;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = selector >> (i * 4);
      const auto byte = static_cast<uint8_t>(bytes >> ((nibble & 7) * 8));
      picked |= uint32_t{nibble & 8 ? (byte >> 7) * 0xffu : byte} << (i * 8);
    }
    return picked;
  }
};

}  // namespace effllm::ptx
