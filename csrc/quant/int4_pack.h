// int4_pack: codes uint8 [N, K] (0..15, any strides) -> qweight int32 [ceil(N/64), ceil(K/64)*512]
// in the layout of int4_layout.h. Padding holds code 8. Codes over 15: an error on the CPU, masked
// to their low four bits on the GPU, which cannot raise.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "quant/int4_layout.h"

namespace effllm {

struct Int4PackParams {
  int64_t n, k;
  const uint8_t* codes;
  int64_t stride_n, stride_k;
  int32_t* qweight;  // contiguous

  constexpr int64_t num_strips() const { return int4_num_strips(n); }
  constexpr int64_t strip_words() const { return int4_strip_words(k); }
};

inline Int4PackParams check_int4_pack(const View& codes) {
  Check check("int4_pack");
  Sym n("N"), k("K");
  check(codes).dtype({DType::kUInt8}).shape({n, k});
  return {*n, *k, codes.data_as<uint8_t>(), codes.stride(0), codes.stride(1), nullptr};
}

// The word at (strip, word): eight codes or their padding.
constexpr uint32_t int4_pack_word(const Int4PackParams& params, int64_t strip, int64_t word) {
  const Int4Corner corner = int4_corner(strip, word);
  uint32_t packed = 0;
  for (int element = 0; element < 8; ++element) {
    const int row_half = element & 1, col_half = (element >> 1) & 1, odd = element >> 2;
    const int64_t n = corner.n + 8 * row_half, k = corner.k + 8 * col_half + odd;
    uint32_t code = kInt4PaddingCode;
    if (n < params.n && k < params.k) {
      code = params.codes[n * params.stride_n + k * params.stride_k] & 15u;
    }
    packed |= code << int4_shift(row_half, col_half, odd);
  }
  return packed;
}

}  // namespace effllm
