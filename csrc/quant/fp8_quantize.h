// fp8_quantize: rows, or groups of 128 columns, of x as e4m3 codes and scales, x ~ code * scale.
//
//   x           [..., K]  fp16, bf16 or fp32; rows may be strided
//   xq, scales            as code_rows.h says, without a known scale
#pragma once

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/view.h"
#include "quant/code_rows.h"

namespace effllm {

// Everything but what is written, and where the rows of x are.
inline QuantizeRowsParams check_fp8_quantize(const View& x, std::optional<int64_t> group_size) {
  Check check("fp8_quantize");
  Sym k("K");
  check(x).last_dim(k).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  return {check_code_rows(check, x, std::nullopt, group_size), {}};
}

}  // namespace effllm
