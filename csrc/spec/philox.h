// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): the same numbers on the CPU and the GPU, from a key and a counter alone.
#pragma once

#include <array>
#include <cstdint>

namespace effllm {

using PhiloxWords = std::array<uint32_t, 4>;

constexpr PhiloxWords philox(uint64_t key, PhiloxWords counter) {
  constexpr uint64_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
  auto key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * counter[0], product1 = kMultiplier1 * counter[2];
    counter = {
        static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

// In [0, 1), of 53 bits: with fewer, a 0 and with it an outcome of no probability would come up.
constexpr double philox_uniform(uint64_t key, PhiloxWords counter) {
  const PhiloxWords words = philox(key, counter);
  return static_cast<double>(((uint64_t{words[0]} << 32) | words[1]) >> 11) * 0x1p-53;
}

}  // namespace effllm
