// lut4_gemm: out = x @ W^T + bias with 4-bit codes into a codebook of 16 values,
// W[n, k] = codebook[.., code[n, k]] * s[n, k/g].
//
//   x, qweight, scales, bias, out   as in packed_gemm.h; no scales means 1
//   codebook [16], [N, 16] or [N, ceil(K/g), 16]   any float dtype, any strides
//
// N is that of the codebook, the scales or the bias. If none of them has it, it is all rows that
// qweight has: 64 * ceil(N/64).
//
// Codebook values enter the product rounded to the dtype of x, which is exact if they have it: a
// tensor core takes no other. The scale is applied in fp32 to each group's sum, so the only other
// roundings are those of an fp32 accumulation and of the final cast.
//
// Packed padding is never looked up: an entry that is NaN or infinite reaches only the outputs of
// weights that use it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "gemm/packed_gemm.h"

namespace effllm {

inline constexpr int kCodebookSize = 16;

struct Lut4GemmParams : PackedGemmParams {
  const void* codebook;
  DType codebook_dtype;
  // Of rows, groups and entries; 0 along what shares a codebook.
  int64_t stride_codebook_n, stride_codebook_g, stride_codebook_entry;
};

// N by the first argument that has it.
inline int64_t lut4_num_rows(const View& qweight, const View& codebook,
                             const std::optional<View>& scales, const std::optional<View>& bias) {
  if (codebook.rank > 1) return codebook.size(0);
  if (scales && scales->rank > 0) return scales->size(0);
  if (bias && bias->rank > 0) return bias->size(0);
  return qweight.rank > 0 ? qweight.size(0) * kInt4StripRows : 0;
}

inline void check_codebook(Check& check, const View& codebook, int64_t n, int64_t num_groups) {
  check(codebook).dtype(kFloatDTypes);
  const int64_t sizes[3] = {n, num_groups, kCodebookSize}, row_sizes[2] = {n, kCodebookSize};
  bool matches = codebook.rank >= 1 && codebook.rank <= 3 && codebook.size(-1) == kCodebookSize;
  for (int dim = 0; matches && dim + 1 < codebook.rank; ++dim) {
    matches = codebook.size(dim) == sizes[dim];
  }
  check.that(matches, "codebook must be [16], [N, 16] or [N, ceil(K/g), 16] = [16], " +
                          format_list(row_sizes, 2) + " or " + format_list(sizes, 3) + ", got " +
                          format_list(codebook.sizes, codebook.rank));
}

// Everything but `out`; x must be contiguous.
inline Lut4GemmParams check_lut4_gemm(const View& x, const View& qweight, const View& codebook,
                                      const std::optional<View>& scales,
                                      const std::optional<View>& bias, int64_t group_size) {
  Check check("lut4_gemm");
  Sym k("K");
  check_packed_x(check, x, k, group_size);
  const Dim n("N", lut4_num_rows(qweight, codebook, scales, bias));
  const Dim groups("ceil(K/g)", ceil_div(*k, group_size));
  check_codebook(check, codebook, n.size, groups.size);
  if (scales) check(*scales).dtype(kFloatDTypes).shape({n, groups});
  if (bias) check(*bias).dtype(kFloatDTypes).shape({n});
  check_packed_qweight(check, qweight, n.size, *k);

  Lut4GemmParams params{};
  set_packed_params(params, x, qweight, scales, bias, n.size, group_size);
  params.codebook = codebook.data;
  params.codebook_dtype = codebook.dtype;
  if (codebook.rank > 1) params.stride_codebook_n = codebook.stride(0);
  if (codebook.rank > 2) params.stride_codebook_g = codebook.stride(1);
  params.stride_codebook_entry = codebook.stride(-1);
  return params;
}

}  // namespace effllm
