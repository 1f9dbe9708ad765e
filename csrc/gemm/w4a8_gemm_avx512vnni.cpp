// The CPU's inner loop of w4a8_gemm for few tokens with AVX-512 VNNI. Bound by the bytes of codes:
// those of two rows, 64 columns each, are a load, a shift, two masks and two vpdpbusd, for which
// they are the unsigned bytes. The sums of a group are 16 rows' of 16 lanes each, brought together
// by 45 instructions.
#include "common/x86_intrinsics.h"
#include "gemm/w4a8_code_sums.h"

namespace effllm {
namespace {

constexpr int kTileWords = 512, kPairs = kW4A8CodeSumRows / 2, kPairWords = 16;
constexpr int kPrefetchWords = 12 * kTileWords;  // 512 bytes of each tile: no stream for hardware

// Both operands' even or odd parts of 64 or 128 bits, added.
inline __m512i add_halves(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
inline __m512i add_lanes(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// What the lanes of each row add up to.
inline __m512i totals(const __m512i (&rows)[kW4A8CodeSumRows]) {
  __m512i fours[4];  // of rows, in each lane of 128 bits
  for (int idx = 0; idx < 4; ++idx) {
    __m512i twos[2];
    for (int half = 0; half < 2; ++half) {
      const __m512i a = rows[4 * idx + 2 * half], b = rows[4 * idx + 2 * half + 1];
      twos[half] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    fours[idx] = add_halves(twos[0], twos[1]);
  }
  return add_lanes(add_lanes(fours[0], fours[1]), add_lanes(fours[2], fours[3]));
}

}  // namespace

void sum_w4a8_codes_avx512vnni(const W4A8CodeSums& in) {
  const __m512i mask = _mm512_set1_epi8(15);
  int32_t* sums = in.sums;
  for (int64_t line = 0; line < in.num_lines; sums += kW4A8CodeSumRows) {
    __m512i rows[kW4A8CodeSumRows];
    for (__m512i& row : rows) row = _mm512_setzero_si512();
    const int64_t end = line + in.lines_per_sum;
    for (; line < end && line < in.num_lines; ++line) {
      const int32_t* words = in.words + line / (in.two_lines_per_tile ? 2 : 1) * kTileWords;
      const __m512i x = _mm512_loadu_si512(in.x + line * 64);
#pragma GCC unroll 8
      for (int pair = 0; pair < kPairs; ++pair, words += kPairWords) {
        __builtin_prefetch(words + kPrefetchWords, 0, 2);
        const __m512i codes = _mm512_loadu_si512(words);
        const __m512i low = _mm512_and_si512(codes, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
        rows[pair] = _mm512_dpbusd_epi32(rows[pair], low, x);
        rows[kPairs + pair] = _mm512_dpbusd_epi32(rows[kPairs + pair], high, x);
      }
    }
    _mm512_storeu_si512(sums, totals(rows));
  }
}

}  // namespace effllm
