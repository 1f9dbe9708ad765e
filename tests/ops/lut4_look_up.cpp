// Runs lut4_look_up on the CPU over all codes that a row's look-ups combine; test_lut4_look_up.py
// compiles it. Prints the first wrong register and fails, or nothing.
#include <cstdint>
#include <cstdio>

#include "quant/int4_layout.h"
#include "quant/lut4_layout.h"

namespace {

using effllm::int4_shift;
using effllm::Lut4Planes;

// prmt.b32 as the PTX ISA defines it.
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int idx = 0; idx < 4; ++idx) {
      const uint32_t pick = selector >> (4 * idx) & 15;
      uint32_t byte = bytes >> (8 * (pick & 7)) & 0xff;
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= byte << (8 * idx);
    }
    return result;
  }
};

// Row r and row r + 8 have their own tables; no two entries agree, nor do the bytes of one.
uint32_t entry(int row_half, uint32_t code) { return 40503u * (code + 1 + 16 * row_half) & 0xffff; }

Lut4Planes planes_of(int row_half) {
  Lut4Planes planes{};
  for (int code = 0; code < 16; ++code) {
    planes.low[code / 4] |= (entry(row_half, code) & 0xff) << (8 * (code % 4));
    planes.high[code / 4] |= entry(row_half, code) >> 8 << (8 * (code % 4));
  }
  return planes;
}

// Registers as the mma fragment orders them: row half first, then column half; odd columns above.
bool is_right(uint32_t word, const Lut4Planes& upper, const Lut4Planes& lower) {
  uint32_t a[4];
  effllm::lut4_look_up(word, upper, lower, Permute(), a);
  for (int idx = 0; idx < 4; ++idx) {
    const int row_half = idx % 2, col_half = idx / 2;
    const auto value = [&](int odd) {
      return entry(row_half, word >> int4_shift(row_half, col_half, odd) & 15);
    };
    if (a[idx] == (value(0) | value(1) << 16)) continue;
    std::printf("word %08x: register %d is %08x\n", word, idx, a[idx]);
    return false;
  }
  return true;
}

// The nibbles of 16 bits, with a gap of one after each.
uint32_t spread(uint32_t nibbles) {
  uint32_t spread = 0;
  for (int idx = 0; idx < 4; ++idx) spread |= (nibbles >> (4 * idx) & 15) << (8 * idx);
  return spread;
}

}  // namespace

int main() {
  const Lut4Planes upper = planes_of(0), lower = planes_of(1);
  for (uint32_t codes = 0; codes < 65536; ++codes) {
    const uint32_t others = spread(codes * 40503u >> 8 & 0xffff);
    if (!is_right(spread(codes) | others << 4, upper, lower)) return 1;
    if (!is_right(spread(codes) << 4 | others, upper, lower)) return 1;
  }
}
