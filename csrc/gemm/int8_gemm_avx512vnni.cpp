#include <immintrin.h>

#include "common/vector.h"
#include "gemm/int8_gemm_block.h"

namespace effllm {
namespace {

// vpdpbusd multiplies unsigned bytes by signed ones: weights plus 128 are the unsigned.
struct Int8VnniDot {
  static constexpr int kBytes = 64, kRows = 8, kTokens = 3, kWeightOffset = 128;
  using Weights = __m512i;
  using X = __m512i;
  using Sums = Vector<int32_t, 16>;  // as __m512i, of 64-bit integers, GCC copies it at each step

  static Weights weights(const int8_t* bytes) {
    return _mm512_xor_si512(_mm512_loadu_si512(bytes), _mm512_set1_epi8(-128));
  }
  static X x(const int8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Sums add(Sums sums, Weights weights, X x) {
    return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), weights, x));
  }
  static int32_t total(Sums sums) {
    __m256i halves[2];
    __builtin_memcpy(halves, &sums, sizeof(sums));
    const __m256i eight = _mm256_add_epi32(halves[0], halves[1]);
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
};

}  // namespace

void int8_block_avx512vnni(const Int8Block& block) { multiply_int8_block<Int8VnniDot>(block); }

}  // namespace effllm
