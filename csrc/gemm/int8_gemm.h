// int8_gemm: out = ((x - x_zeros) * x_scales) @ (weight * w_scales)^T + bias, both operands int8.
//
//   x         [..., K]  int8
//   x_scales  one element, or [..., 1] per row
//   weight    [N, K]  int8; rows may be strided
//   w_scales  one element, or [N, 1] per channel
//   bias      [N]  any float dtype
//   x_zeros   one element, or [..., 1] per row, int8; None: 0
//   w_sums    [N]  int32, the sums of the weight's rows, which x_zeros need; None: found anew
//   out       [..., N]  fp16, bf16 or fp32, contiguous
//
// Scales are of any float dtype and any strides. Sums are exact:
//
//   out = float(sum_k x w - x_zero * w_sum) * (w_scale * x_scale) + bias
//
// each operation rounded to fp32, the result once more: the same bits on every device. K is bounded
// such that no int32 overflows.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/view.h"

namespace effllm {

inline constexpr int64_t kInt8GemmMaxK = 131071;      // 2^14 K below 2^31
inline constexpr int64_t kInt8GemmMaxKZeros = 65793;  // 255 * 2^7 K below 2^31

// A value for each row of x or of the weight; stride 0: one for all.
struct Int8RowValues {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;
};

struct Int8GemmParams {
  int64_t m, n, k;
  DType dtype, out_dtype;  // of x and the weight; of out
  const void* x;           // [M, K], contiguous
  const int8_t* weight;
  int64_t stride_weight_n;
  Int8RowValues x_scales, w_scales;
  Int8RowValues x_zeros, w_sums;  // null without zeros
  const void* bias;               // may be null
  DType bias_dtype;
  int64_t stride_bias;
  void* out;  // [M, N], contiguous
};

inline constexpr std::initializer_list<DType> kInt8ScaleDTypes = {DType::kFloat16, DType::kBFloat16,
                                                                  DType::kFloat32};

// `rows` is `values` with its leading dimensions in one.
inline Int8RowValues check_int8_x_values(Check& check, const View& x, const View& values,
                                         const View& rows, std::initializer_list<DType> dtypes) {
  check(values).dtype(dtypes);
  if (values.numel() == 1) return {values.data, values.dtype, 0};
  bool matches = values.rank == x.rank && values.size(-1) == 1;
  for (int dim = 0; matches && dim + 1 < x.rank; ++dim) matches = values.size(dim) == x.size(dim);
  check.that(matches,
             std::string(values.name) + " must have one element, or be [..., 1] for x [..., K] = " +
                 format_list(x.sizes, x.rank) + ", got " + format_list(values.sizes, values.rank));
  return {rows.data, rows.dtype, rows.rank > 1 ? rows.stride(0) : 0};
}

inline Int8RowValues check_int8_w_scales(Check& check, const View& scales, int64_t n) {
  check(scales).dtype(kInt8ScaleDTypes);
  if (scales.numel() == 1) return {scales.data, scales.dtype, 0};
  check.that(scales.rank == 2 && scales.size(0) == n && scales.size(1) == 1,
             "w_scales must have one element, or be [N, 1] = [" + std::to_string(n) + ", 1], got " +
                 format_list(scales.sizes, scales.rank));
  return {scales.data, scales.dtype, scales.stride(0)};
}

inline void check_int8_out_dtype(Check& check, DType out_dtype) {
  check.that(
      out_dtype == DType::kFloat16 || out_dtype == DType::kBFloat16 || out_dtype == DType::kFloat32,
      std::string("out_dtype must be float16, bfloat16 or float32, got ") + dtype_name(out_dtype));
}

// Values of the rows of x: as they are, and with their leading dimensions in one.
struct Int8XValues {
  View values, rows;
};

// Everything but `out`, and the sums of the weight's rows where they are to be found; x must be
// contiguous.
inline Int8GemmParams check_int8_gemm(const View& x, const Int8XValues& x_scales,
                                      const View& weight, const View& w_scales,
                                      const std::optional<View>& bias,
                                      const std::optional<Int8XValues>& x_zeros,
                                      const std::optional<View>& w_sums, DType out_dtype) {
  Check check("int8_gemm");
  Sym k("K"), n("N");
  check(x).last_dim(k).dtype({DType::kInt8});
  Int8GemmParams params{};
  params.x_scales = check_int8_x_values(check, x, x_scales.values, x_scales.rows, kInt8ScaleDTypes);
  check(weight).dtype({DType::kInt8}).shape({n, k}).last_stride_one();
  params.w_scales = check_int8_w_scales(check, w_scales, *n);
  if (bias) {
    check(*bias).dtype(kInt8ScaleDTypes).shape({n});
    params.bias = bias->data;
    params.bias_dtype = bias->dtype;
    params.stride_bias = bias->stride(0);
  }
  if (x_zeros) {
    params.x_zeros = check_int8_x_values(check, x, x_zeros->values, x_zeros->rows, {DType::kInt8});
  }
  if (w_sums) {
    check.that(x_zeros.has_value(), "w_sums must be None without x_zeros, got a tensor");
    check(*w_sums).dtype({DType::kInt32}).shape({n});
    params.w_sums = {w_sums->data, DType::kInt32, w_sums->stride(0)};
  }
  const int64_t max_k = x_zeros ? kInt8GemmMaxKZeros : kInt8GemmMaxK;
  check.that(*k <= max_k, "K must be at most " + std::to_string(max_k) +
                              (x_zeros ? " with x_zeros" : "") +
                              ", so that no sum overflows int32, got " + std::to_string(*k));
  check_int8_out_dtype(check, out_dtype);
  params.m = 1;
  for (int dim = 0; dim + 1 < x.rank; ++dim) params.m *= x.size(dim);
  params.n = *n;
  params.k = *k;
  params.dtype = x.dtype;
  params.out_dtype = out_dtype;
  params.x = x.data;
  params.weight = weight.data_as<int8_t>();
  params.stride_weight_n = weight.stride(0);
  return params;
}

}  // namespace effllm
