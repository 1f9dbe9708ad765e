// int4_gemm: out = x @ W^T + bias with 4-bit weights W[n, k] = (q[n, k] - z[n, k/g]) * s[n, k/g].
//
//   x       [..., K]  fp16 or bf16 (fp32 on the CPU only)
//   qweight int32 [ceil(N/64), ceil(K/64)*512]   layout of int4_layout.h; its rows may be strided
//   scales  [N, ceil(K/g)]  any float dtype, any strides
//   zeros   uint8 [N, ceil(K/g)], any strides; none means 8
//   bias    [N]  any float dtype
//   out     [..., N]  dtype of x, contiguous
//
// g is 32, 64, 128 or K; the last group may be short. Products are of exact integers (q - z) and
// the scale is applied in fp32 to each group's sum, so the only roundings are those of an fp32
// accumulation and of the final cast.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/view.h"
#include "quant/int4_layout.h"

namespace effllm {

struct Int4GemmParams {
  int64_t m, n, k, group_size, num_groups;
  DType dtype;    // of x and out
  const void* x;  // [M, K], contiguous
  const int32_t* qweight;
  int64_t stride_qweight_strip;
  const void* scales;
  DType scales_dtype;
  int64_t stride_scales_n, stride_scales_g;
  const uint8_t* zeros;  // may be null
  int64_t stride_zeros_n, stride_zeros_g;
  const void* bias;  // may be null
  DType bias_dtype;
  int64_t stride_bias;
  void* out;  // [M, N], contiguous
};

// Everything but `out`, which the op allocates afterwards, and a contiguous `x`.
inline Int4GemmParams check_int4_gemm(const View& x, const View& qweight, const View& scales,
                                      const std::optional<View>& zeros,
                                      const std::optional<View>& bias, int64_t group_size) {
  Check check("int4_gemm");
  Sym n("N"), k("K");
  check(x).last_dim(k);
  if (x.device.type == Device::Type::kCPU) {
    check(x).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  } else {
    check(x).dtype({DType::kFloat16, DType::kBFloat16});
  }
  check.that(group_size == 32 || group_size == 64 || group_size == 128 ||
                 (group_size == *k && group_size > 0),
             "group_size must be 32, 64, 128 or K = " + std::to_string(*k) + ", got " +
                 std::to_string(group_size));
  const int64_t num_groups = ceil_div(*k, group_size);
  const auto floats = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  check(scales).dtype(floats).shape({n, {"ceil(K/g)", num_groups}});
  check(qweight)
      .dtype({DType::kInt32})
      .shape({{"ceil(N/64)", int4_num_strips(*n)}, {"ceil(K/64)*512", int4_strip_words(*k)}})
      .last_stride_one()
      .aligned(16, 4);
  if (zeros) check(*zeros).dtype({DType::kUInt8}).shape({n, {"ceil(K/g)", num_groups}});
  if (bias) check(*bias).dtype(floats).shape({n});

  Int4GemmParams params{};
  params.m = *k == 0 ? 1 : x.numel() / *k;
  if (*k == 0) {
    for (int dim = 0; dim + 1 < x.rank; ++dim) params.m *= x.size(dim);
  }
  params.n = *n;
  params.k = *k;
  params.group_size = group_size;
  params.num_groups = num_groups;
  params.dtype = x.dtype;
  params.x = x.data;
  params.qweight = qweight.data_as<int32_t>();
  params.stride_qweight_strip = qweight.stride(0);
  params.scales = scales.data;
  params.scales_dtype = scales.dtype;
  params.stride_scales_n = scales.stride(0);
  params.stride_scales_g = scales.stride(1);
  if (zeros) {
    params.zeros = zeros->data_as<uint8_t>();
    params.stride_zeros_n = zeros->stride(0);
    params.stride_zeros_g = zeros->stride(1);
  }
  if (bias) {
    params.bias = bias->data;
    params.bias_dtype = bias->dtype;
    params.stride_bias = bias->stride(0);
  }
  return params;
}

// Tile shapes of the mma.sync kernel. `token_tiles` counts 8-token columns of one CTA's 64-row
// strip; `k_slices` warps per 16 rows share the work along K, which is what keeps enough loads in
// flight for few tokens.
struct Int4GemmConfig {
  int token_tiles, k_slices;
  int tokens() const { return 8 * token_tiles; }
};

inline constexpr std::array<Int4GemmConfig, 3> kInt4GemmConfigs{{
    {1, 8},  // decode: up to 8 tokens
    {4, 4},  // up to 32 tokens: small batches, verification
    {8, 2},  // prefill
}};

constexpr int select_int4_gemm_config(int64_t m) { return m <= 8 ? 0 : m <= 32 ? 1 : 2; }

}  // namespace effllm
