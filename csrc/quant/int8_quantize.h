// int8_quantize: rows of x as int8 codes and scales, x ~ code * scale.
//
//   x           [..., K]  fp16, bf16 or fp32; rows may be strided
//   scale       one element of any float dtype and shape, known beforehand; None: one per row
//   xq, scales            as code_rows.h says, without groups
#pragma once

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/view.h"
#include "quant/code_rows.h"

namespace effllm {

// Everything but what is written, and where the rows of x are.
inline QuantizeRowsParams check_int8_quantize(const View& x, const std::optional<View>& scale) {
  Check check("int8_quantize");
  Sym k("K");
  check(x).last_dim(k).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  return {check_code_rows(check, x, scale, std::nullopt), {}};
}

}  // namespace effllm
