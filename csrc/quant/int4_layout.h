// Where a 4-bit code lives. One layout serves tensor cores, SIMT code and the CPU.
//
// qweight is int32 [ceil(N / 64), ceil(K / 64) * 512]: one row per strip of 64 output rows, in it
// one tile of 64 x 64 codes (2 KB) after the other along K. A tile holds, for each of 128 threads,
// the 16 bytes that are the thread's A fragments of four mma.m16n8k16 (and, stacked, of one wgmma
// m64k64):
//
//             k: 0 .. 15   16 .. 31   32 .. 47   48 .. 63
//   n  0 .. 15  [ word 0     word 1     word 2     word 3 ]   threads  0 ..  31
//   n 16 .. 31  [   .          .          .          .    ]   threads 32 ..  63
//   n 32 .. 47  [   .          .          .          .    ]   threads 64 ..  95
//   n 48 .. 63  [   .          .          .          .    ]   threads 96 .. 127
//
// Thread t reads words 4 t .. 4 t + 3 of the tile.
//
// Within a 16 x 16 block lane 4 g + c owns rows g, g + 8 and columns 2 c, 2 c + 1, 2 c + 8, 2 c +
// 9: eight codes, in one word. Code pairs that share a 32-bit register after dequantisation sit 16
// bits apart, so `(word >> 4 j) & 0x000f000f` yields register j of the fragment.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace effllm {

constexpr int64_t kInt4StripRows = 64;
constexpr int64_t kInt4TileWords = 512;  // 64 x 64 codes, 8 per word
constexpr int kInt4PaddingCode = 8;      // decodes to 0 with the symmetric zero point

constexpr int64_t int4_num_strips(int64_t n) { return ceil_div<int64_t>(n, kInt4StripRows); }
constexpr int64_t int4_strip_words(int64_t k) { return ceil_div<int64_t>(k, 64) * kInt4TileWords; }

// Word of code (n, k) in the row of its strip.
constexpr int64_t int4_word(int64_t n, int64_t k) {
  const int64_t thread = 32 * ((n % 64) / 16) + 4 * (n % 8) + (k % 8) / 2;
  return (k / 64) * kInt4TileWords + 4 * thread + (k % 64) / 16;
}

// Lowest bit of the element that holds rows (+8 if `row_half`) and columns (+8 if `col_half`,
// +1 if `odd`) within the word.
constexpr int int4_shift(int row_half, int col_half, int odd) {
  return 4 * (2 * col_half + row_half) + 16 * odd;
}

constexpr int int4_shift_of(int64_t n, int64_t k) {
  return int4_shift(static_cast<int>((n % 16) / 8), static_cast<int>((k % 16) / 8),
                    static_cast<int>(k % 2));
}

// The inverse of int4_word: the first row and column of a word's eight codes, which are those at
// rows n, n + 8 and columns k, k + 1, k + 8, k + 9.
struct Int4Corner {
  int64_t n, k;
};

constexpr Int4Corner int4_corner(int64_t strip, int64_t word) {
  const int64_t thread = (word % kInt4TileWords) / 4;
  return {strip * kInt4StripRows + 16 * (thread / 32) + (thread % 32) / 4,
          (word / kInt4TileWords) * 64 + 16 * (word % 4) + 2 * (thread % 4)};
}

}  // namespace effllm
