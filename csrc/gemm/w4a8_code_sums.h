// What the CPU's loop of w4a8_gemm for few tokens is given: 16 rows of codes times one token, whose
// products are summed up as they are. Zero points and multipliers are applied to sums of groups,
// by which that is exact. The loop is w4a8_gemm_avx512vnni.cpp.
#pragma once

#include <cstdint>

namespace effllm {

inline constexpr int kW4A8CodeSumRows = 16;

struct W4A8CodeSums {
  const int32_t* words;  // of the first tile
  int64_t num_lines, lines_per_sum;
  bool two_lines_per_tile;  // in each of which x is zero where the other's columns are
  const int8_t* x;          // [num_lines, 64], in the order of the words

  int32_t* sums;  // [sums, 16 rows], out
};

// Defined on x86-64 alone.
void sum_w4a8_codes_avx512vnni(const W4A8CodeSums& in);

}  // namespace effllm
