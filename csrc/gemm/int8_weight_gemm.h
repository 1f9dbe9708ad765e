// int8_weight_gemm: out = x @ (weight * w_scales)^T + bias with weights alone in int8.
//
//   x         [..., K]  fp16 or bf16 (fp32 on the CPU only)
//   weight    [N, K]  int8; rows may be strided
//   w_scales  one element, [N, 1] per channel, or [N, ceil(K/128)] per channel and group of 128
//             columns; any float dtype and strides
//   bias      [N]  any float dtype
//   out       [..., N]  dtype of x, contiguous
//
// int8 is exact in the type of x; scales apply to fp32 sums, of 128 columns where there are groups.
// But for its codes this is fp8_weight_gemm, whose loops and kernel it shares.
//
// The CPU multiplies bf16 x in tiles of bf16 where the processor has AMX, else, and x of other
// types always, in fp32. The products are the same. Their order is not, and numbers below 2^-126
// count as zero. Either way a token's sum is built in the same order whatever the tokens beside it:
// CPU results do not depend on the batch.
#pragma once

#include <optional>
#include <string>

#include "gemm/fp8_gemm.h"

namespace effllm {

inline Fp8Scales check_int8_group_scales(Check& check, const View& scales, int64_t n, int64_t k) {
  check(scales).dtype(kFp8ScaleDTypes);
  if (scales.numel() == 1) return {scales.data, scales.dtype};
  const int64_t groups = ceil_div(k, kFp8GroupSize);
  const bool matches =
      scales.rank == 2 && scales.size(0) == n && (scales.size(1) == 1 || scales.size(1) == groups);
  check.that(matches, "w_scales must have one element, or be [N, 1] or [N, ceil(K/128)] = [" +
                          std::to_string(n) + ", " + std::to_string(groups) + "], got " +
                          format_list(scales.sizes, scales.rank));
  return {scales.data, scales.dtype, scales.stride(0), scales.stride(1), 0, scales.size(1) != 1};
}

// Everything but `out`; x must be contiguous.
inline Fp8GemmParams check_int8_weight_gemm(const View& x, const View& weight, const View& w_scales,
                                            const std::optional<View>& bias) {
  Check check("int8_weight_gemm");
  Sym k("K");
  check(x).last_dim(k);
  if (x.device.type == Device::Type::kCPU) {
    check(x).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  } else {
    check(x).dtype({DType::kFloat16, DType::kBFloat16});
  }
  Fp8GemmParams params = check_byte_weight(check, x, k, weight, DType::kInt8, bias);
  params.w_scales = check_int8_group_scales(check, w_scales, params.n, params.k);
  params.out_dtype = x.dtype;
  return params;
}

}  // namespace effllm
