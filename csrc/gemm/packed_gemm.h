// What the matmuls over packed 4-bit codes share: arguments and checks. The ops differ in how a
// code becomes a weight.
//
//   x       [..., K]  fp16 or bf16 (fp32 on the CPU only)
//   qweight int32 [ceil(N/64), ceil(K/64)*512]   layout of int4_layout.h; its rows may be strided
//   scales  [N, ceil(K/g)]  any float dtype, any strides
//   bias    [N]  any float dtype
//   out     [..., N]  dtype of x, contiguous
//
// g is 32, 64, 128 or K; the last group may be short.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/view.h"
#include "quant/int4_layout.h"

namespace effllm {

struct PackedGemmParams {
  int64_t m, n, k, group_size, num_groups;
  DType dtype;          // of x and out
  const void* x;        // [M, K], contiguous
  const int32_t* perm;  // [K]: column k of the codes goes with column perm[k] of x; null: k
  const int32_t* qweight;
  int64_t stride_qweight_strip;
  const void* scales;  // null: all 1
  DType scales_dtype;
  int64_t stride_scales_n, stride_scales_g;
  const void* bias;  // may be null
  DType bias_dtype;
  int64_t stride_bias;
  void* out;  // [M, N], contiguous
};

inline constexpr std::initializer_list<DType> kFloatDTypes = {DType::kFloat16, DType::kBFloat16,
                                                              DType::kFloat32};

inline void check_group_size(Check& check, int64_t group_size, int64_t k) {
  check.that(group_size == 32 || group_size == 64 || group_size == 128 ||
                 (group_size == k && group_size > 0),
             "group_size must be 32, 64, 128 or K = " + std::to_string(k) + ", got " +
                 std::to_string(group_size));
}

// x and the group size, which the shapes of everything else follow from. Binds K.
inline void check_packed_x(Check& check, const View& x, Sym& k, int64_t group_size) {
  check(x).last_dim(k);
  if (x.device.type == Device::Type::kCPU) {
    check(x).dtype(kFloatDTypes);
  } else {
    check(x).dtype({DType::kFloat16, DType::kBFloat16});
  }
  check_group_size(check, group_size, *k);
}

inline void check_packed_qweight(Check& check, const View& qweight, int64_t n, int64_t k) {
  check(qweight)
      .dtype({DType::kInt32})
      .shape({{"ceil(N/64)", int4_num_strips(n)}, {"ceil(K/64)*512", int4_strip_words(k)}})
      .last_stride_one()
      .aligned(16, 4);
}

// Into `params`, of checked arguments: everything but `out`, which the op allocates afterwards.
inline void set_packed_params(PackedGemmParams& params, const View& x, const View& qweight,
                              const std::optional<View>& scales, const std::optional<View>& bias,
                              int64_t n, int64_t group_size) {
  const int64_t k = x.size(-1);
  params.m = 1;
  for (int dim = 0; dim + 1 < x.rank; ++dim) params.m *= x.size(dim);
  params.n = n;
  params.k = k;
  params.group_size = group_size;
  params.num_groups = ceil_div(k, group_size);
  params.dtype = x.dtype;
  params.x = x.data;
  params.qweight = qweight.data_as<int32_t>();
  params.stride_qweight_strip = qweight.stride(0);
  if (scales) {
    params.scales = scales->data;
    params.scales_dtype = scales->dtype;
    params.stride_scales_n = scales->stride(0);
    params.stride_scales_g = scales->stride(1);
  }
  if (bias) {
    params.bias = bias->data;
    params.bias_dtype = bias->dtype;
    params.stride_bias = bias->stride(0);
  }
}

}  // namespace effllm
