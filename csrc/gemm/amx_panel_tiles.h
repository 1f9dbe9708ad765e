// What the loops in AMX tiles of bf16 share: the tile registers, and what is turned around in those
// of vectors, x on its way into panels, and sums on theirs to the rows of `out`. In internal
// linkage, as vector.h is.
#pragma once

#include <cstdint>

#include "common/amx.h"
#include "common/x86_intrinsics.h"
#include "gemm/amx_panels.h"

namespace effllm {
namespace {

// The tile registers that multiply panels of so many tokens: 0 .. 3 are sums, 4 and 5 weights, 6
// and 7 of x.
inline TileConfig panel_tiles(int width) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool weights = tile == 4 || tile == 5;
    config.set(tile, kAmxRows, weights ? kAmxRowBytes : 4 * width);
  }
  return config;
}

// [16][16] of 32 bits each.
inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int idx = 0; idx < 16; idx += 2) {
    pairs[idx] = _mm512_unpacklo_epi32(rows[idx], rows[idx + 1]);
    pairs[idx + 1] = _mm512_unpackhi_epi32(rows[idx], rows[idx + 1]);
  }
  // Lane l of fours[i + j] is column 4 l + j of rows i .. i + 3.
  for (int idx = 0; idx < 16; idx += 4) {
    fours[idx] = _mm512_unpacklo_epi64(pairs[idx], pairs[idx + 2]);
    fours[idx + 1] = _mm512_unpackhi_epi64(pairs[idx], pairs[idx + 2]);
    fours[idx + 2] = _mm512_unpacklo_epi64(pairs[idx + 1], pairs[idx + 3]);
    fours[idx + 3] = _mm512_unpackhi_epi64(pairs[idx + 1], pairs[idx + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // lanes of both operands
  for (int j = 0; j < 4; ++j) {
    const __m512i upper_even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kEven);
    const __m512i upper_odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kOdd);
    const __m512i lower_even = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kEven);
    const __m512i lower_odd = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kOdd);
    rows[j] = _mm512_shuffle_i32x4(upper_even, lower_even, kEven);
    rows[4 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, kEven);
    rows[8 + j] = _mm512_shuffle_i32x4(upper_even, lower_even, kOdd);
    rows[12 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, kOdd);
  }
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A mask of the first `count` lanes, all if there are more.
template <class Mask>
constexpr Mask first_lanes(int64_t count) {
  constexpr int kLanes = 8 * sizeof(Mask);
  if (count >= kLanes) return static_cast<Mask>(-1);
  return count <= 0 ? Mask{0} : static_cast<Mask>((Mask{1} << count) - 1);
}

// Tiles [first_tile .. last_tile - 1] of all panels. first_column(pair) is the first column, within
// its tile, of one of the 32 pairs.
template <class FirstColumn>
void gather_panels(const AmxTokens& tokens, int64_t first_tile, int64_t last_tile,
                   const FirstColumn& first_column) {
  constexpr int kPairs = kAmxPanelTileK / 2, kLoadPairs = 16;
  int pair_of[kPairs];
  for (int pair = 0; pair < kPairs; ++pair) pair_of[first_column(pair) / 2] = pair;
  const int width = amx_panel_width(tokens.num_tokens);
  const __mmask16 lanes = first_lanes<__mmask16>(width);
  for (int first_token = 0; first_token < tokens.num_tokens; first_token += kAmxPanelTokens) {
    const int64_t count = smaller(tokens.num_tokens - first_token, kAmxPanelTokens);
    const bfloat16* const from = tokens.x + first_token * tokens.k;
    bfloat16* const panel = tokens.tiles + first_token * kAmxPanelTileK;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      for (int half = 0; half < kPairs; half += kLoadPairs) {
        const int64_t column = tile * kAmxPanelTileK + 2 * half;
        const __mmask32 columns = first_lanes<__mmask32>(tokens.k - column);
        __m512i pairs[kLoadPairs];
        for (int token = 0; token < kAmxPanelTokens; ++token) {
          pairs[token] = token < count
                             ? _mm512_maskz_loadu_epi16(columns, from + token * tokens.k + column)
                             : _mm512_setzero_si512();
        }
        transpose(pairs);
        for (int idx = 0; idx < kLoadPairs; ++idx) {
          bfloat16* to = panel + tile * tokens.stride_tile + 2 * width * pair_of[half + idx];
          _mm512_mask_storeu_epi32(to, lanes, pairs[idx]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace effllm
