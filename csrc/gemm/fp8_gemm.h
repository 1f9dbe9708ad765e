// fp8_gemm: out = (x * x_scales) @ (weight * w_scales)^T + bias, both operands e4m3.
//
//   x         [..., K]  e4m3
//   x_scales  one element, [..., 1] per row, or [..., ceil(K/128)] per row and group of 128 columns
//   weight    [N, K]  e4m3; rows may be strided
//   w_scales  one element, [N, 1] per channel, or [ceil(N/128), ceil(K/128)] per block of 128 x 128
//   bias      [N]  any float dtype
//   out       [..., N]  fp16, bf16 or fp32, contiguous
//
// Scales are of any float dtype and any strides, in any mixture of the granularities; the last
// group and the last blocks may be short. fp8_quantize makes scales of x such that those of a group
// lie beside each other for all rows, which is the fastest to read.
//
// Scales apply to sums of exact products, of 128 columns where there are groups or blocks, else of
// all. Sums are fp32; on Hopper its tensor cores, which keep some 14 bits, add up to 128 columns of
// them, 512 where `out` is bf16, or all that are scaled together where the caller does not ask for
// accuracy, but none where `out` is fp32 and he does. NaN codes are NaN; a scale that is NaN or
// infinite reaches the outputs that it is for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/math.h"
#include "common/view.h"
#include "quant/fp8_layout.h"

namespace effllm {

// Scales of the rows of x or of the weight.
struct Fp8Scales {
  const void* data = nullptr;  // null: all 1
  DType dtype = DType::kFloat32;
  int64_t stride_row = 0, stride_group = 0;
  int row_shift = 0;     // 2^row_shift rows share a scale
  bool grouped = false;  // one per 128 columns

  constexpr int64_t index(int64_t row, int64_t group) const {
    return (row >> row_shift) * stride_row + (grouped ? group * stride_group : 0);
  }
};

struct Fp8GemmParams {
  int64_t m, n, k;
  DType dtype;  // of x: e4m3, or a float where weights alone are codes
  DType out_dtype;
  const void* x;          // [M, K], contiguous
  const uint8_t* weight;  // e4m3, or int8 of int8_weight_gemm
  int64_t stride_weight_n;
  Fp8Scales x_scales, w_scales;
  const void* bias;  // may be null
  DType bias_dtype;
  int64_t stride_bias;
  void* out;  // [M, N], contiguous

  // Whether sums of 128 columns are scaled one by one.
  constexpr bool grouped() const { return x_scales.grouped || w_scales.grouped; }
};

inline constexpr std::initializer_list<DType> kFp8ScaleDTypes = {DType::kFloat16, DType::kBFloat16,
                                                                 DType::kFloat32};

// `rows` is x_scales with its leading dimensions in one.
inline Fp8Scales check_fp8_x_scales(Check& check, const View& x, const View& scales,
                                    const View& rows) {
  check(scales).dtype(kFp8ScaleDTypes);
  if (scales.numel() == 1) return {scales.data, scales.dtype};
  const int64_t groups = ceil_div(x.size(-1), kFp8GroupSize);
  bool matches = scales.rank == x.rank && (scales.size(-1) == 1 || scales.size(-1) == groups);
  for (int dim = 0; matches && dim + 1 < x.rank; ++dim) matches = scales.size(dim) == x.size(dim);
  check.that(matches,
             "x_scales must have one element, or be [..., 1] or [..., ceil(K/128)] = [..., " +
                 std::to_string(groups) + "] for x [..., K] = " + format_list(x.sizes, x.rank) +
                 ", got " + format_list(scales.sizes, scales.rank));
  const int64_t stride_row = rows.rank > 1 ? rows.stride(0) : 0;
  return {rows.data, rows.dtype, stride_row, rows.stride(-1), 0, scales.size(-1) != 1};
}

inline Fp8Scales check_fp8_w_scales(Check& check, const View& scales, int64_t n, int64_t k) {
  check(scales).dtype(kFp8ScaleDTypes);
  if (scales.numel() == 1) return {scales.data, scales.dtype};
  const int64_t channels[2] = {n, 1};
  const int64_t blocks[2] = {ceil_div(n, kFp8GroupSize), ceil_div(k, kFp8GroupSize)};
  const auto has_sizes = [&](const int64_t (&sizes)[2]) {
    return scales.rank == 2 && scales.size(0) == sizes[0] && scales.size(1) == sizes[1];
  };
  check.that(has_sizes(channels) || has_sizes(blocks),
             "w_scales must have one element, or be [N, 1] or [ceil(N/128), ceil(K/128)] = " +
                 format_list(channels, 2) + " or " + format_list(blocks, 2) + ", got " +
                 format_list(scales.sizes, scales.rank));
  const bool grouped = !has_sizes(channels);
  static_assert(kFp8GroupSize == 1 << 7);
  return {scales.data, scales.dtype, scales.stride(0), scales.stride(1), grouped ? 7 : 0, grouped};
}

// What ops over weights of a byte each take, of a checked x: all but scales and `out`.
inline Fp8GemmParams check_byte_weight(Check& check, const View& x, Sym& k, const View& weight,
                                       DType codes, const std::optional<View>& bias) {
  Sym n("N");
  check(weight).dtype({codes}).shape({n, k}).last_stride_one();
  if (bias) check(*bias).dtype(kFp8ScaleDTypes).shape({n});

  Fp8GemmParams params{};
  params.m = 1;
  for (int dim = 0; dim + 1 < x.rank; ++dim) params.m *= x.size(dim);
  params.n = *n;
  params.k = *k;
  params.dtype = x.dtype;
  params.x = x.data;
  params.weight = static_cast<const uint8_t*>(weight.data);
  params.stride_weight_n = weight.stride(0);
  if (bias) {
    params.bias = bias->data;
    params.bias_dtype = bias->dtype;
    params.stride_bias = bias->stride(0);
  }
  return params;
}

// Both ops over e4m3 weights: with the weight's scales.
inline Fp8GemmParams check_fp8_weight(Check& check, const View& x, Sym& k, const View& weight,
                                      const View& w_scales, const std::optional<View>& bias) {
  Fp8GemmParams params = check_byte_weight(check, x, k, weight, DType::kFloat8E4M3, bias);
  params.w_scales = check_fp8_w_scales(check, w_scales, params.n, params.k);
  return params;
}

// Everything but `out`; x must be contiguous, x_scale_rows is [M, groups] if x has a row at all.
inline Fp8GemmParams check_fp8_gemm(const View& x, const View& x_scales, const View& x_scale_rows,
                                    const View& weight, const View& w_scales,
                                    const std::optional<View>& bias, DType out_dtype) {
  Check check("fp8_gemm");
  Sym k("K");
  check(x).last_dim(k).dtype({DType::kFloat8E4M3});
  const Fp8Scales checked_x_scales = check_fp8_x_scales(check, x, x_scales, x_scale_rows);
  Fp8GemmParams params = check_fp8_weight(check, x, k, weight, w_scales, bias);
  params.x_scales = checked_x_scales;
  check.that(
      out_dtype == DType::kFloat16 || out_dtype == DType::kBFloat16 || out_dtype == DType::kFloat32,
      std::string("out_dtype must be float16, bfloat16 or float32, got ") + dtype_name(out_dtype));
  params.out_dtype = out_dtype;
  return params;
}

}  // namespace effllm
