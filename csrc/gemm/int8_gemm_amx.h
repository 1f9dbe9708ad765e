// The CPU's loops over int8 weights for processors with AMX: up to 32 rows of W times panels of 16
// tokens, exact in int32. A panel is [K / 64][16 fours of columns][16 tokens][4 columns].
#pragma once

#include <cstdint>

namespace effllm {

inline constexpr int kInt8AmxRows = 32;
inline constexpr int kInt8AmxTokens = 16;  // of a panel
inline constexpr int kInt8AmxPanels = 4;   // of one call: sums stay in L1
inline constexpr int kInt8AmxTileK = 64;   // to a multiple of which panels are padded
inline constexpr int kInt8AmxTileBytes = kInt8AmxTokens * kInt8AmxTileK;
inline constexpr int kInt8AmxMinTokens = 4;  // fewer are multiplied as soon by vectors

struct Int8AmxBlock {
  const int8_t* weight;
  int64_t stride_weight;
  int num_rows;
  int64_t k;

  const int8_t* x;  // panels one after the other, zero past K and where there are no tokens
  int num_panels;
};

// Defined in int8_gemm_amx.cpp, on x86-64 alone.

// sums [16 num_panels tokens, 32 rows].
void multiply_int8_amx(const Int8AmxBlock& block, int32_t* sums);

// totals [num_rows, 64 tokens], the sum over groups of group_k columns, a multiple of 64, of theirs
// times scales [groups, 32 rows].
void multiply_int8_groups_amx(const Int8AmxBlock& block, int64_t group_k, const float* scales,
                              float* totals);

}  // namespace effllm
