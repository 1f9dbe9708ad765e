// What the CPU's inner loops over packed 4-bit codes are given: a "strip", up to 64 rows of W,
// times a few tokens. Each loop has its own order of rows, which are "slots" there, and of columns.
#pragma once

#include <cstdint>

namespace effllm {

inline constexpr int kPackedCpuTileK = 64;
inline constexpr int kPackedCpuRows = 64;
inline constexpr int kPackedCpuTileWords = 512;

// X is the type that the loop takes x in.
template <class X>
struct StripOf {
  const int32_t* words;  // [num_tiles, 512], the strip's row of qweight
  int64_t num_tiles;
  int num_rows;  // up to 64; whole blocks of 16 are computed

  const X* x;  // [num_tiles, num_tokens, 64] in the loop's order, zero past K
  int64_t stride_x_tile;
  int num_tokens;  // up to what the loop takes

  // A tile has one group, which may go on for more tiles, or two of 32 columns. Each slot and group
  // has a scale in [64 slots, groups], and what its decoder reads.
  const float* scales;
  int64_t stride_scales;
  const float* decoding;
  int64_t stride_decoding_slot, stride_decoding_group;
  int64_t tiles_per_group;
  bool two_groups_per_tile;

  // [2, 16 words] for all tiles but the last, and for the last: kPackedCpuPadding in the bytes of
  // columns past K. Decoders whose weights may be no numbers make such codes 0.
  const uint32_t* padding;

  float* sums;  // [num_tokens, 64 slots], out
};

}  // namespace effllm
