// The CPU's loop that makes int8 of the 4-bit codes of w4a8_gemm: two rows at a time, less zero
// points or times multipliers. Bound by the int8 that it writes, twice the bytes that it reads.
//
// Sixteen consecutive words of a tile hold two rows, n in the low and n + 8 in the high half of
// each byte. So 64 bytes become a line of either row by a mask, without a shuffle:
//
//   words  [ 0 .. 3 ][ 4 .. 7 ][ 8 .. 11 ][ 12 .. 15 ]   of each four, two have columns of the
//                                                        first, two of the second half of the tile
//
// Pairs of codes are 16-bit lanes: f * q + (128 - f * z) is 0 .. 255 for multipliers f with z = 8
// as for zero points z with f = 1, so that no byte touches the one above it. Compiled as
// packed_gemm_strip.h is: internal linkage, and no inline function that has not.
#pragma once

#include <cstdint>

#include "common/vector.h"

namespace effllm {

struct W4A8CodeRows {
  const int32_t* words;  // of the first tile
  int64_t num_lines;
  bool two_lines_per_tile;  // which differ in their zero points

  // Of rows n and n + 8, a byte a group: zero points or multipliers; null: zero points of 8.
  const uint8_t* groups[2];
  bool are_multipliers;
  int64_t num_groups, stride_group;
  int64_t lines_per_run, groups_per_run;  // of two groups in a run, each has half of its one line

  int8_t *low, *high;  // [num_lines, 64 bytes] of row n and of n + 8, out
};

using W4A8CodeRowsKernel = void (*)(const W4A8CodeRows&);

// Defined in w4a8_gemm_<isa>.cpp, on x86-64 alone.
void unpack_w4a8_rows_avx2(const W4A8CodeRows& rows);
void unpack_w4a8_rows_avx512(const W4A8CodeRows& rows);

namespace {

// What makes int8 of a row's codes, pairs of them at a time.
template <int kWidth>
class W4A8PairTerms {
 public:
  using Pairs = Vector<uint16_t, kWidth>;

  W4A8PairTerms(const W4A8CodeRows& rows, const uint8_t* of_row, int64_t group) {
    const Pair first(rows, of_row, group);
    factors_ = reinterpret_cast<Pairs>(Words{} + first.factors);
    offsets_ = reinterpret_cast<Pairs>(Words{} + first.offsets);
    if (rows.groups_per_run == 1 || group + 1 == rows.num_groups) return;
    const Pair second(rows, of_row, group + 1);
    factors_ = in_halves(first.factors, second.factors);
    offsets_ = in_halves(first.offsets, second.offsets);
  }

  Pairs operator()(Pairs codes) const { return ((codes & 0x0f0f) * factors_ + offsets_) ^ 0x8080; }

 private:
  using Words = Vector<uint32_t, kWidth>;

  // For two codes of two rows, of which one is masked.
  struct Pair {
    uint32_t factors, offsets;

    Pair(const W4A8CodeRows& rows, const uint8_t* of_row, int64_t group) {
      const uint32_t value = of_row == nullptr ? 8 : of_row[group * rows.stride_group];
      factors = 0x00010001 * (rows.are_multipliers ? value : 1);
      offsets = 0x01010101 * (128 - (rows.are_multipliers ? 8 * value : value));
    }
  };

  // One value where words have columns of the first half of a tile, one where of the second.
  static Pairs in_halves(uint32_t first, uint32_t second) {
    uint32_t words[kWidth];
    for (int word = 0; word < kWidth; ++word) words[word] = word / 2 % 2 == 0 ? first : second;
    return load_vector<Pairs>(words);
  }

  Pairs factors_, offsets_;
};

template <int kWidth>
void unpack_w4a8_rows(const W4A8CodeRows& rows) {
  constexpr int kTileWords = 512, kLineWords = 16;
  int8_t *low = rows.low, *high = rows.high;
  int64_t line = 0;
  for (int64_t group = 0; line < rows.num_lines; group += rows.groups_per_run) {
    const W4A8PairTerms<kWidth> low_terms(rows, rows.groups[0], group);
    const W4A8PairTerms<kWidth> high_terms(rows, rows.groups[1], group);
    const int64_t end = line + rows.lines_per_run;
    for (; line < end && line < rows.num_lines; ++line) {
      const int32_t* words = rows.words + line / (rows.two_lines_per_tile ? 2 : 1) * kTileWords;
      for (int word = 0; word < kLineWords; word += kWidth, low += 4 * kWidth, high += 4 * kWidth) {
        const auto codes = load_vector<Vector<uint16_t, kWidth>>(words + word);
        store_vector(low_terms(codes), low);
        store_vector(high_terms(codes >> 4), high);
      }
    }
  }
}

}  // namespace
}  // namespace effllm
