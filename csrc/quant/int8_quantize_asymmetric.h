// int8_quantize_asymmetric: rows of x as int8 codes, scales and zero points,
// x ~ (code - zero) * scale, as int8_gemm takes them.
//
//   x       [..., K]  fp16, bf16 or fp32; rows may be strided
//   xq      [..., K]  int8, contiguous
//   scales  [..., 1]  fp32; in memory as code_rows.h says
//   zeros   [..., 1]  int8, contiguous
//
// int8_layout.h says how they are found.
#pragma once

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/view.h"
#include "quant/code_rows.h"

namespace effllm {

struct AsymmetricRowsParams : QuantizeRowsParams {
  int8_t* zeros;  // [M]
};

// Everything but what is written, and where the rows of x are.
inline AsymmetricRowsParams check_int8_quantize_asymmetric(const View& x) {
  Check check("int8_quantize_asymmetric");
  Sym k("K");
  check(x).last_dim(k).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  return {{check_code_rows(check, x, std::nullopt, std::nullopt), {}}, nullptr};
}

}  // namespace effllm
