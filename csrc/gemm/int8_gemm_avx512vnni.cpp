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
    return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(sums));
  }
};

}  // namespace

void int8_block_avx512vnni(const Int8Block& block) { multiply_int8_block<Int8VnniDot>(block); }

}  // namespace effllm
