// fp8_quantize: rows, or groups of 128 columns, of x as e4m3 codes and scales, x ~ code * scale.
//
//   x       [..., K]  fp16, bf16 or fp32, contiguous
//   xq      [..., K]  e4m3, contiguous
//   scales  [..., ceil(K/g)]  fp32; in memory [ceil(K/g), round_up(M, 4)] for the M rows of x
//
// g is 128, of which the last group may be short, or K: one scale per row. Kernels of GEMMs read
// the scales of one group for many rows at once, so rows are innermost, and groups start at
// multiples of 16 bytes as TMA demands. fp8_layout.h says how scales and codes are found.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/math.h"
#include "common/view.h"
#include "quant/fp8_layout.h"

namespace effllm {

struct Fp8QuantizeParams {
  int64_t m, k, group_size, num_groups;
  DType dtype;
  const void* x;  // [M, K]
  uint8_t* codes;
  float* scales;
  int64_t stride_scales_group;

  constexpr int64_t num_scales() const { return m * num_groups; }
  // Of the group that an index of [M, num_groups] stands for.
  constexpr int64_t row(int64_t index) const { return index / num_groups; }
  constexpr int64_t group(int64_t index) const { return index % num_groups; }
  constexpr int64_t first_column(int64_t index) const { return group(index) * group_size; }
  constexpr int64_t num_columns(int64_t index) const {
    const int64_t left = k - first_column(index);
    return left < group_size ? left : group_size;
  }
};

// Everything but what is written.
inline Fp8QuantizeParams check_fp8_quantize(const View& x, std::optional<int64_t> group_size) {
  Check check("fp8_quantize");
  Sym k("K");
  check(x).last_dim(k).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  check.that(!group_size || *group_size == kFp8GroupSize,
             "group_size must be 128, or None for one scale per row, got " +
                 std::to_string(group_size.value_or(0)));

  Fp8QuantizeParams params{};
  params.m = 1;
  for (int dim = 0; dim + 1 < x.rank; ++dim) params.m *= x.size(dim);
  params.k = *k;
  params.group_size = group_size.value_or(*k);
  params.num_groups = group_size ? ceil_div(*k, *group_size) : 1;
  params.dtype = x.dtype;
  params.x = x.data;
  params.stride_scales_group = round_up<int64_t>(params.m, 4);
  return params;
}

}  // namespace effllm
