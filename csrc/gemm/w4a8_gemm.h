// w4a8_gemm: out = (x * x_scales) @ W^T + bias with int8 x and 4-bit weights
// W[n, k] = (q[n, k] - z[n, k/g]) * s[n, k/g], or, by two levels of scales, those of groups
// integers, W[n, k] = (q[n, k] - 8) * m[n, k/g] * s[n].
//
//   x         [..., K]  int8, columns in order
//   x_scales  one element, or [..., 1] per row
//   qweight   int32 [ceil(N/64), ceil(K/64)*512]   layout of int4_layout.h; its rows may be strided
//   scales    [N, ceil(K/g)], with multipliers [N, 1]  any float dtype, any strides
//   zeros     uint8 [N, ceil(K/g)], 0 .. 128, any strides; none means 8
//   bias      [N]  any float dtype
//   multipliers  m, uint8 [N, ceil(K/g)], 0 .. 15, any strides; not beside zeros
//   out       [..., N]  fp16, bf16 or fp32, contiguous
//
// g is 32, 64, 128 or K; the last group may be short. Zero points are such that q - z is an int8,
// of which a group's products are summed exactly. The CPU raises on a larger one, the GPU, which
// cannot raise, takes it for 128.
//
// (q - 8) * m is an int8, too, -120 .. 105. The CPU raises on a multiplier over 15, the GPU takes
// its low four bits.
//
// With one group or multipliers, out is to the bit what int8_gemm makes of q - z or (q - 8) * m, on
// every device:
//
//   out = float(sum_k x (q - z)) * (s * x_scale) + bias
//
// With more groups, a scale is applied to each group's sum, and these are added in fp32:
//
//   out = (sum_g float(sum_k x (q - z)) * s[g]) * x_scale + bias
//
// each operation rounded to fp32, the result once more. The CPU adds groups from the first to the
// last; the GPU in an order that depends on M, and may not round the products. Either way a sum is
// at most 2 ceil(K/g) roundings from the exact one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "gemm/int4_gemm.h"
#include "gemm/int8_gemm.h"

namespace effllm {

inline constexpr int kW4A8MaxZero = 128;
inline constexpr int kW4A8MaxMultiplier = 15;

struct W4A8Multipliers {
  const uint8_t* data;  // null: none
  int64_t stride_n, stride_g;
  int64_t group_size, num_groups;  // 32, 64 or 128 columns each
};

struct W4A8GemmParams : Int4GemmParams {  // with multipliers of a single group
  Int8RowValues x_scales;
  W4A8Multipliers multipliers;
  DType out_dtype;
};

inline W4A8Multipliers w4a8_multipliers(const View& values, int64_t k, int64_t group_size) {
  constexpr int64_t kLargest = 128;
  W4A8Multipliers multipliers{values.data_as<uint8_t>(), values.stride(0), values.stride(1),
                              group_size, values.size(1)};
  if (multipliers.num_groups == 1) {  // the same for each 128 columns
    multipliers.stride_g = 0;
    multipliers.group_size = kLargest;
    multipliers.num_groups = ceil_div(k, kLargest);
  }
  return multipliers;
}

// Everything but `out`; x must be contiguous.
inline W4A8GemmParams check_w4a8_gemm(const View& x, const Int8XValues& x_scales,
                                      const View& qweight, const View& scales,
                                      const std::optional<View>& zeros,
                                      const std::optional<View>& bias,
                                      const std::optional<View>& multipliers, int64_t group_size,
                                      DType out_dtype) {
  Check check("w4a8_gemm");
  Sym n("N"), k("K");
  check(x).last_dim(k).dtype({DType::kInt8});
  check_group_size(check, group_size, *k);
  W4A8GemmParams params{};
  params.x_scales = check_int8_x_values(check, x, x_scales.values, x_scales.rows, kFloatDTypes);
  const Dim groups("ceil(K/g)", ceil_div(*k, group_size));
  check(scales).dtype(kFloatDTypes).shape({n, multipliers ? Dim("1", 1) : groups});
  check_packed_qweight(check, qweight, *n, *k);
  if (zeros) check(*zeros).dtype({DType::kUInt8}).shape({n, groups});
  if (bias) check(*bias).dtype(kFloatDTypes).shape({n});
  if (multipliers) {
    check(*multipliers).dtype({DType::kUInt8}).shape({n, groups});
    check.that(!zeros, "zeros must be None beside multipliers, got " +
                           (zeros ? format_list(zeros->sizes, zeros->rank) : ""));
  }
  const int64_t added_columns = multipliers ? *k : group_size;
  check.that(added_columns <= kInt8GemmMaxK,
             "K must be at most " + std::to_string(kInt8GemmMaxK) +
                 (multipliers ? " with multipliers" : " in one group") +
                 ", so that no sum overflows int32, got " + std::to_string(*k));
  check_int8_out_dtype(check, out_dtype);

  set_packed_params(params, x, qweight, scales, bias, *n, std::max<int64_t>(added_columns, 1));
  set_zeros(params, zeros);
  if (multipliers) {
    params.num_groups = 1;  // even of no columns
    params.multipliers = w4a8_multipliers(*multipliers, *k, group_size);
  }
  params.out_dtype = out_dtype;
  return params;
}

}  // namespace effllm
