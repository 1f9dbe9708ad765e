// x of the CPU's loops in AMX tiles of bf16: in panels, of which a tile register takes 16 pairs of
// columns. amx_panel_tiles.h brings it there.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace effllm {

inline constexpr int kAmxPanelTokens = 16;
inline constexpr int kAmxPanelTileK = 64;

namespace {

// Tokens of each panel of a call: few are one panel that is hardly wider than they are.
constexpr int amx_panel_width(int64_t num_tokens) {
  int width = 1;
  while (width < kAmxPanelTokens && width < num_tokens) width *= 2;
  return width;
}

// Tokens with those that fill the last panel, where a call takes up to max_tokens.
constexpr int64_t amx_padded_tokens(int64_t num_tokens, int64_t max_tokens) {
  const int64_t rest = num_tokens % max_tokens, width = amx_panel_width(rest);
  return num_tokens - rest + (rest + width - 1) / width * width;
}

}  // namespace

// x of one call, and where it goes: a tile of x is [panels][2 steps][16 pairs][panel's tokens][2],
// its pairs of columns in the order in which W is decoded, zero past K and where there are no
// tokens.
struct AmxTokens {
  const bfloat16* x;  // [num_tokens, k]
  int64_t k;
  int num_tokens;
  bfloat16* tiles;
  int64_t stride_tile;
};

}  // namespace effllm
