// What the CPU's loop of int4_gemm for bf16 x is given: up to 64 rows of W times some tokens, by
// dot products of bf16 pairs. The loop is int4_gemm_avx512bf16.cpp.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "gemm/packed_strip.h"

namespace effllm {

inline constexpr int kInt4Bf16MaxTokens = 64;  // of one call: the sums of 16 rows are half of L1

// What the zero points of a strip are. The more is known, the fewer instructions take them off.
enum class Int4Zeros : uint8_t {
  kEight,    // all 8, as where there are none; they are not read
  kUpTo16,   // q - zero is looked up
  kUpTo255,  // q - zero is converted
};

// Where the loop's pairs of columns are in a tile of x: for each c = 0 .. 3 and half = 0, 1 of a
// word's codes (int4_layout.h) those of the four 16-column blocks.
constexpr int int4_bf16_pair(int idx) {
  const int c = idx / 8, half = idx / 4 % 2, block = idx % 4;
  return 8 * block + 4 * half + c;
}

// Slots are rows, as they are. x is in the order above. The decoding of a slot and group is a word,
// kept as a float that nobody computes with: all its bytes are 16 - zero, modulo 256.
using Int4Bf16Strip = StripOf<bfloat16>;

// Defined on x86-64 alone.
void int4_strip_avx512bf16(const Int4Bf16Strip& strip, Int4Zeros kind_of_zeros);

}  // namespace effllm
