// rms_norm_fp8_quantize and rms_norm_int8_quantize: the norm before a linear layer, as 8-bit codes
// and scales; and add_rms_norm_fp8_quantize and add_rms_norm_int8_quantize, which first add to the
// residual stream.
//
//   x         [..., K]  fp16, bf16 or fp32; rows may be strided
//   weight    [K]       dtype of x
//   residual  [..., K]  dtype and shape of x, strides of its own
//   residual_out [..., K]  x + residual in their dtype, contiguous: what the next block adds to
//   xq, scales          as code_rows.h says
//
// The arithmetic is that of a Hugging Face LlamaRMSNorm in the dtype of x: the sum is rounded to
// it; h / sqrt(mean(h^2) + eps) is found in fp32 and rounded to it, and so is its product with the
// weight. For the same bits on every device the root and the divisions are true ones, squares and
// sums are rounded apart, and the order of the sum is this: each lane (row_lanes in code_rows.h)
// sums each of its 8 elements over its octets; then those 8 are folded by halves (0 + 4, .. 3 + 7;
// of those 0 + 2, 1 + 3; ..), the 32 lanes of a warp likewise, and then the warps.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/view.h"
#include "quant/code_rows.h"

namespace effllm {

struct RmsNormParams {
  CodeRows rows;
  StridedRows x, residual;  // residual.data is null if there is none
  const void* weight;
  bool weight_wide;    // as StridedRows::wide
  void* residual_out;  // [M, K]
  float eps;

  // Whether all rows may go 16 bytes at a time; those of residual_out may if those of x may.
  constexpr bool wide() const {
    return x.wide && weight_wide && (residual.data == nullptr || residual.wide);
  }
};

// Everything but what is written, and where the rows of x and residual are.
inline RmsNormParams check_rms_norm_rows(const char* op, const View& x,
                                         const std::optional<View>& residual, const View& weight,
                                         const std::optional<View>& scale, double eps,
                                         std::optional<int64_t> group_size) {
  Check check(op);
  Sym k("K");
  check(x).last_dim(k).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  if (residual) check(*residual).dtype({x.dtype}).same_shape(x);
  check(weight).dtype({x.dtype}).shape({k}).last_stride_one();
  check.that(eps >= 0 && std::isfinite(eps),
             "eps must be finite and at least 0, got " + std::to_string(eps));
  RmsNormParams params{};
  params.rows = check_code_rows(check, x, scale, group_size);
  params.weight = weight.data;
  params.weight_wide = weight.has_aligned_rows(16, element_bytes(weight.dtype));
  params.eps = static_cast<float>(eps);
  return params;
}

// Into sums[0] of `count` sums, a power of two.
inline float fold_halves(float* sums, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// On the CPU: the sum of squares of a row, in the order of above.
template <class T>
float sum_of_squares(const T* row, int64_t k) {
  const int lanes = row_lanes(k);
  float of_elements[kMaxRowLanes * kOctet] = {};
  for (int64_t first = 0; first < k; first += lanes * kOctet) {
    const int64_t columns = std::min<int64_t>(lanes * kOctet, k - first);
    for (int64_t i = 0; i < columns; ++i) {
      const float value = to_float(row[first + i]);
      of_elements[i] += value * value;
    }
  }
  float of_lanes[kMaxRowLanes], of_warps[kMaxRowLanes / 32];
  for (int lane = 0; lane < lanes; ++lane) {
    of_lanes[lane] = fold_halves(of_elements + lane * kOctet, kOctet);
  }
  for (int warp = 0; warp < lanes / 32; ++warp) {
    of_warps[warp] = fold_halves(of_lanes + warp * 32, 32);
  }
  return fold_halves(of_warps, lanes / 32);
}

// On the CPU: row `row`, normalised in the dtype that is quantised. Writes residual_out.
template <class T>
void rms_norm_row(const RmsNormParams& params, int64_t row, T* y) {
  const int64_t k = params.rows.k;
  const T* h = static_cast<const T*>(params.x.data) + row * params.x.stride;
  if (params.residual.data != nullptr) {
    const T* residual = static_cast<const T*>(params.residual.data) + row * params.residual.stride;
    T* sum = static_cast<T*>(params.residual_out) + row * k;
    for (int64_t i = 0; i < k; ++i) sum[i] = from_float<T>(to_float(h[i]) + to_float(residual[i]));
    h = sum;
  }
  const float mean = sum_of_squares(h, k) / static_cast<float>(k);
  const float inverse = 1.f / std::sqrt(mean + params.eps);
  const T* weight = static_cast<const T*>(params.weight);
  for (int64_t i = 0; i < k; ++i) {
    const float normalised = to_float(from_float<T>(to_float(h[i]) * inverse));
    y[i] = from_float<T>(normalised * to_float(weight[i]));
  }
}

// On the CPU: everything.
template <class Codes, class Threads>
void quantize_rms_norm_rows(const RmsNormParams& params, const Threads& threads) {
  dispatch_float(params.rows.dtype, [&](auto element) {
    using T = decltype(element);
    quantize_made_rows<Codes, T>(params.rows, threads,
                                 [&](int64_t row, T* y) { rms_norm_row(params, row, y); });
  });
}

}  // namespace effllm
