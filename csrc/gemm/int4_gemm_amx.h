// What the CPU's loop of int4_gemm for bf16 x is given on processors with AMX: up to 64 rows of W
// times some tokens, in tiles. The loop is int4_gemm_amx.cpp.
#pragma once

#include <bit>
#include <cstdint>

#include "gemm/amx_panels.h"
#include "gemm/packed_strip.h"

namespace effllm {

inline constexpr int kInt4AmxMaxTokens = 64;  // of one call: the sums of a strip are 16 KB of L1

// Slots are rows, as they are. The decoding of a slot and group is an int32, kept as a float that
// nobody computes with: int4_amx_decoding of the zero point, also where there are none.
using Int4AmxStrip = StripOf<bfloat16>;

constexpr float int4_amx_decoding(uint8_t zero) { return std::bit_cast<float>(255 - int{zero}); }

// Defined on x86-64 alone.
void int4_gather_amx(const AmxTokens& tokens, int64_t first_tile, int64_t last_tile,
                     bool two_groups_per_tile);
void int4_strip_amx(const Int4AmxStrip& strip, bool has_zeros);

}  // namespace effllm
