#include <immintrin.h>

#include "gemm/int8_gemm_block.h"

namespace effllm {
namespace {

// Products of pairs of 16-bit numbers: those of bytes would saturate.
struct Int8Avx2Dot {
  static constexpr int kBytes = 16, kRows = 4, kTokens = 2, kWeightOffset = 0;
  using Weights = __m256i;
  using X = __m256i;
  using Sums = __m256i;

  static Weights weights(const int8_t* bytes) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static X x(const int8_t* bytes) { return weights(bytes); }
  static Sums add(Sums sums, Weights weights, X x) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(weights, x));
  }
  static int32_t total(Sums sums) {
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
};

}  // namespace

void int8_block_avx2(const Int8Block& block) { multiply_int8_block<Int8Avx2Dot>(block); }

}  // namespace effllm
