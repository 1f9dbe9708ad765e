// int4_gemm: out = x @ W^T + bias with 4-bit weights W[n, k] = (q[n, k] - z[n, k/g]) * s[n, k/g].
//
//   x, qweight, scales, bias, out   as in packed_gemm.h; scales are required
//   zeros   uint8 [N, ceil(K/g)], any strides; none means 8
//   perm    int32 [K], a permutation; none means columns in order
//
// With `perm`, as GPTQ's act-order leaves weights, column k of q, z and s goes with x[...,
// perm[k]]. The CPU raises on an entry out of range, the GPU, which cannot raise, clamps it.
//
// Products are of exact integers (q - z) and the scale is applied in fp32 to each group's sum, so
// the only roundings are those of an fp32 accumulation and of the final cast. On sm_90 that holds
// up to 32 tokens; for more, each weight (q - z) * s may be rounded once to the type of x before it
// is multiplied, which is what a dense layer over the dequantised weight does.
//
// The CPU multiplies bf16 x by dot products of bf16 pairs where the processor has them (AMX or
// AVX-512 BF16), else, and x of other types always, in fp32. q - z is exact in bf16, too: the
// products are the same. Their order is not, and numbers below 2^-126 count as zero. Either way a
// token's sum is built in the same order whatever the tokens beside it: CPU results do not depend
// on the batch.
#pragma once

#include <cstdint>
#include <optional>

#include "gemm/packed_gemm.h"

namespace effllm {

struct Int4GemmParams : PackedGemmParams {
  const uint8_t* zeros;  // may be null
  int64_t stride_zeros_n, stride_zeros_g;
};

inline void set_zeros(Int4GemmParams& params, const std::optional<View>& zeros) {
  if (!zeros) return;
  params.zeros = zeros->data_as<uint8_t>();
  params.stride_zeros_n = zeros->stride(0);
  params.stride_zeros_g = zeros->stride(1);
}

// Everything but `out`; x must be contiguous.
inline Int4GemmParams check_int4_gemm(const View& x, const View& qweight, const View& scales,
                                      const std::optional<View>& zeros,
                                      const std::optional<View>& bias,
                                      const std::optional<View>& perm, int64_t group_size) {
  Check check("int4_gemm");
  Sym n("N"), k("K");
  check_packed_x(check, x, k, group_size);
  const Dim groups("ceil(K/g)", ceil_div(*k, group_size));
  check(scales).dtype(kFloatDTypes).shape({n, groups});
  check_packed_qweight(check, qweight, *n, *k);
  if (zeros) check(*zeros).dtype({DType::kUInt8}).shape({n, groups});
  if (bias) check(*bias).dtype(kFloatDTypes).shape({n});
  if (perm) check(*perm).dtype({DType::kInt32}).shape({k}).last_stride_one();

  Int4GemmParams params{};
  set_packed_params(params, x, qweight, scales, bias, *n, group_size);
  set_zeros(params, zeros);
  if (perm) params.perm = perm->data_as<int32_t>();
  return params;
}

}  // namespace effllm
