// w4a8_gemm: out = (x * x_scales) @ W^T + bias with int8 x and 4-bit weights
// W[n, k] = (q[n, k] - z[n, k/g]) * s[n, k/g].
//
//   x         [..., K]  int8, columns in order
//   x_scales  one element, or [..., 1] per row
//   qweight   int32 [ceil(N/64), ceil(K/64)*512]   layout of int4_layout.h; its rows may be strided
//   scales    [N, ceil(K/g)]  any float dtype, any strides
//   zeros     uint8 [N, ceil(K/g)], 0 .. 128, any strides; none means 8
//   bias      [N]  any float dtype
//   out       [..., N]  fp16, bf16 or fp32, contiguous
//
// g is 32, 64, 128 or K; the last group may be short. Zero points are such that q - z is an int8,
// of which a group's products are summed exactly. The CPU raises on a larger one, the GPU, which
// cannot raise, takes it for 128.
//
// With one group, out is to the bit what int8_gemm makes of q - z, on every device:
//
//   out = float(sum_k x (q - z)) * (s * x_scale) + bias
//
// With more, a scale is applied to each group's sum, and these are added in fp32:
//
//   out = (sum_g float(sum_k x (q - z)) * s[g]) * x_scale + bias
//
// each operation rounded to fp32, the result once more. The CPU adds groups from the first to the
// last; the GPU in an order that depends on M, and may not round the products. Either way a sum is
// at most 2 ceil(K/g) roundings from the exact one.
#pragma once

#include <cstdint>
#include <optional>

#include "gemm/int4_gemm.h"
#include "gemm/int8_gemm.h"

namespace effllm {

inline constexpr int kW4A8MaxZero = 128;

struct W4A8GemmParams : Int4GemmParams {
  Int8RowValues x_scales;
  DType out_dtype;
};

// Everything but `out`; x must be contiguous.
inline W4A8GemmParams check_w4a8_gemm(const View& x, const Int8XValues& x_scales,
                                      const View& qweight, const View& scales,
                                      const std::optional<View>& zeros,
                                      const std::optional<View>& bias, int64_t group_size,
                                      DType out_dtype) {
  Check check("w4a8_gemm");
  Sym n("N"), k("K");
  check(x).last_dim(k).dtype({DType::kInt8});
  check_group_size(check, group_size, *k);
  W4A8GemmParams params{};
  params.x_scales = check_int8_x_values(check, x, x_scales.values, x_scales.rows, kFloatDTypes);
  const Dim groups("ceil(K/g)", ceil_div(*k, group_size));
  check(scales).dtype(kFloatDTypes).shape({n, groups});
  check_packed_qweight(check, qweight, *n, *k);
  if (zeros) check(*zeros).dtype({DType::kUInt8}).shape({n, groups});
  if (bias) check(*bias).dtype(kFloatDTypes).shape({n});
  check.that(group_size <= kInt8GemmMaxK,
             "K must be at most " + std::to_string(kInt8GemmMaxK) +
                 " in one group, so that no sum overflows int32, got " + std::to_string(*k));
  check_int8_out_dtype(check, out_dtype);

  set_packed_params(params, x, qweight, scales, bias, *n, group_size);
  set_zeros(params, zeros);
  params.out_dtype = out_dtype;
  return params;
}

}  // namespace effllm
