// What the CPU's loop of int4_gemm for bf16 x is given on processors with AMX: up to 64 rows of W
// times some tokens, in tiles. The loop is int4_gemm_amx.cpp.
#pragma once

#include <bit>
#include <cstdint>

#include "common/dtype.h"
#include "gemm/packed_strip.h"

namespace effllm {

inline constexpr int kInt4AmxTokens = 16;     // of a panel of x
inline constexpr int kInt4AmxMaxTokens = 64;  // of one call: the sums of a strip are 16 KB of L1

namespace {

// Tokens of each panel of a call: few are one panel that is hardly wider than they are.
constexpr int int4_amx_panel_width(int64_t num_tokens) {
  int width = 1;
  while (width < kInt4AmxTokens && width < num_tokens) width *= 2;
  return width;
}

}  // namespace

// x of one call, and where it goes: a tile of x is [panels][2 steps][16 pairs][panel's tokens][2],
// its pairs of columns in the order in which W is decoded, zero past K and where there are no
// tokens.
struct Int4AmxTokens {
  const bfloat16* x;  // [num_tokens, k]
  int64_t k;
  int num_tokens;
  bool two_groups_per_tile;
  bfloat16* tiles;
  int64_t stride_tile;
};

// Slots are rows, as they are. The decoding of a slot and group is an int32, kept as a float that
// nobody computes with: int4_amx_decoding of the zero point, also where there are none.
using Int4AmxStrip = StripOf<bfloat16>;

constexpr float int4_amx_decoding(uint8_t zero) { return std::bit_cast<float>(255 - int{zero}); }

// Defined on x86-64 alone.
void int4_gather_amx(const Int4AmxTokens& tokens, int64_t first_tile, int64_t last_tile);
void int4_strip_amx(const Int4AmxStrip& strip, bool has_zeros);

}  // namespace effllm
