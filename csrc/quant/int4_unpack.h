// int4_unpack: qweight int32 [ceil(N/64), ceil(K/64)*512] -> codes uint8 [N, K], the inverse of
// int4_pack. Rows of qweight may be strided (a slice along K of a wider weight).
#pragma once

#include <cstdint>
#include <string>

#include "common/check.h"
#include "quant/int4_layout.h"

namespace effllm {

struct Int4UnpackParams {
  int64_t n, k;
  const int32_t* qweight;
  int64_t stride_strip;
  uint8_t* codes;  // contiguous
};

inline Int4UnpackParams check_int4_unpack(const View& qweight, int64_t n, int64_t k) {
  Check check("int4_unpack");
  check.that(n >= 0 && k >= 0, "n and k must be at least 0, got n = " + std::to_string(n) +
                                   ", k = " + std::to_string(k));
  check(qweight)
      .dtype({DType::kInt32})
      .shape({{"ceil(n/64)", int4_num_strips(n)}, {"ceil(k/64)*512", int4_strip_words(k)}})
      .last_stride_one();
  return {n, k, qweight.data_as<int32_t>(), qweight.stride(0), nullptr};
}

constexpr uint8_t int4_unpack_code(const Int4UnpackParams& params, int64_t n, int64_t k) {
  const int32_t* row = params.qweight + (n / kInt4StripRows) * params.stride_strip;
  return static_cast<uint8_t>((static_cast<uint32_t>(row[int4_word(n, k)]) >> int4_shift_of(n, k)) &
                              15u);
}

}  // namespace effllm
