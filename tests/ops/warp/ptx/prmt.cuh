// In place of csrc/ptx/prmt.cuh: the same by shifts.
#pragma once

#include <cstdint>

namespace effllm::ptx {

struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t pick = selector >> (4 * i);
      const auto byte = static_cast<uint8_t>(bytes >> (8 * (pick & 7)));
      const uint32_t sign = byte < 128 ? 0 : 255;
      result |= ((pick & 8) != 0 ? sign : uint32_t{byte}) << (8 * i);
    }
    return result;
  }
};

}  // namespace effllm::ptx
