// fp8_weight_gemm: out = x @ (weight * w_scales)^T + bias with weights alone in e4m3.
//
//   x         [..., K]  fp16 or bf16 (fp32 on the CPU only)
//   weight, w_scales, bias  as in fp8_gemm.h
//   out       [..., N]  dtype of x, contiguous
//
// e4m3 is exact in the type of x; scales apply to fp32 sums, as in fp8_gemm.h.
//
// The CPU multiplies bf16 x in tiles of bf16 where the processor has AMX, else, and x of other
// types always, in fp32. The products are the same. Their order is not, and numbers below 2^-126
// count as zero. Either way a token's sum is built in the same order whatever the tokens beside it:
// CPU results do not depend on the batch.
#pragma once

#include <optional>

#include "gemm/fp8_gemm.h"

namespace effllm {

// Everything but `out`; x must be contiguous.
inline Fp8GemmParams check_fp8_weight_gemm(const View& x, const View& weight, const View& w_scales,
                                           const std::optional<View>& bias) {
  Check check("fp8_weight_gemm");
  Sym k("K");
  check(x).last_dim(k);
  if (x.device.type == Device::Type::kCPU) {
    check(x).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  } else {
    check(x).dtype({DType::kFloat16, DType::kBFloat16});
  }
  Fp8GemmParams params = check_fp8_weight(check, x, k, weight, w_scales, bias);
  params.out_dtype = x.dtype;
  return params;
}

}  // namespace effllm
