// Rows that become 8-bit codes and scales: what fp8_quantize and int8_quantize share with the ops
// that make rows and quantise them at once.
//
//   xq      [..., K]  e4m3 or int8, contiguous
//   scales  [..., ceil(K/g)]  fp32; in memory [ceil(K/g), round_up(M, 4)] for the M rows
//           or, with a known scale of all rows as fp8_quantize_tensor takes it, that alone, [1]
//
// g is 128, of which the last group may be short, or K: one scale per row. Kernels of GEMMs read
// the scales of one group for many rows at once, so rows are innermost, and groups start at
// multiples of 16 bytes as TMA demands. fp8_layout.h and int8_layout.h say how scales and codes are
// found, by types E4M3Codes and Int8Codes.
//
// Rows that are made are quantised in the dtype of x: codes and scales are those of fp8_quantize or
// fp8_quantize_tensor for them. To fuse saves writing and reading them, and changes no bit.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/math.h"
#include "common/view.h"
#include "quant/fp8_layout.h"

namespace effllm {

// Elements that one thread takes at a time, and what sums over a row are made of.
inline constexpr int kOctet = 8;

// How many lanes share a row: column c belongs to lane (c / 8) % lanes. Two octets for each, or
// more where that would be more lanes than a block has threads. Results depend on it where they are
// sums over a row, so that it depends on nothing but K.
constexpr int row_lanes(int64_t k) {
  const int64_t wanted = ceil_div<int64_t>(k, 2 * kOctet);
  return static_cast<int>(
      std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(wanted, 32, 512))));
}
inline constexpr int kMaxRowLanes = 512;

// [M, K], neighbours in a row beside each other.
struct StridedRows {
  const void* data;
  int64_t stride;
  bool wide;  // rows may be loaded 16 bytes at a time
};

// Of a view [M, K], or of [K].
inline StridedRows strided_rows(const View& rows) {
  const bool wide = rows.has_aligned_rows(16, element_bytes(rows.dtype));
  return {rows.data, rows.rank > 1 ? rows.stride(0) : 0, wide && rows.size(-1) % kOctet == 0};
}

struct CodeRows {
  int64_t m, k, group_size, num_groups;
  DType dtype;              // of the rows, before they are codes
  const void* given_scale;  // of all rows; null: each group has its own
  DType given_scale_dtype;
  uint8_t* codes;  // [M, K]
  float* scales;   // [num_groups, stride_scales_group]; the given scale alone if there is one
  int64_t stride_scales_group;

  // Whether groups of 128 columns have scales; a row of 128 may as well be one.
  constexpr bool is_grouped() const {
    return given_scale == nullptr && group_size == kFp8GroupSize;
  }
};

// Of ops that quantise rows as they are.
struct QuantizeRowsParams {
  CodeRows rows;
  StridedRows x;
};

// Everything but what is written. K and dtype of x are checked by the caller.
inline CodeRows check_code_rows(Check& check, const View& x, const std::optional<View>& scale,
                                std::optional<int64_t> group_size) {
  const std::string found = std::to_string(group_size.value_or(0));
  check.that(!group_size || *group_size == kFp8GroupSize,
             "group_size must be 128, or None for one scale per row, got " + found);
  CodeRows rows{};
  rows.m = 1;
  for (int dim = 0; dim + 1 < x.rank; ++dim) rows.m *= x.size(dim);
  rows.k = x.size(-1);
  rows.group_size = group_size.value_or(rows.k);
  rows.num_groups = group_size ? ceil_div(rows.k, *group_size) : 1;
  rows.dtype = x.dtype;
  rows.stride_scales_group = round_up<int64_t>(rows.m, 4);
  if (scale) {
    check(*scale).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
    check.that(scale->numel() == 1,
               "scale must have one element, got " + format_list(scale->sizes, scale->rank));
    check.that(!group_size, "group_size must be None with a scale of all rows, got " + found);
    rows.given_scale = scale->data;
    rows.given_scale_dtype = scale->dtype;
  }
  return rows;
}

// On the CPU: codes and scale of a group of row `row`, whose elements are y[0] .. y[K - 1].
template <class Codes, class T>
void quantize_group(const CodeRows& rows, int64_t row, int64_t group, const T* y) {
  const int64_t first = group * rows.group_size;
  const int64_t columns = std::min(rows.group_size, rows.k - first);
  const float scale = symmetric_scale(max_magnitude_bits(y + first, columns), Codes::kLargest);
  Codes::encode(y + first, columns, scale, rows.codes + row * rows.k + first);
  rows.scales[group * rows.stride_scales_group + row] = scale;
}

// Threads pay off from some ten thousand elements each.
inline constexpr int64_t kElementsPerThread = int64_t{1} << 15;

// On the CPU: calls make(row, y) for all rows, which fills y[0] .. y[K - 1], and quantises each.
template <class Codes, class T, class Threads, class Make>
void quantize_made_rows(const CodeRows& rows, const Threads& threads, const Make& make) {
  if (rows.given_scale != nullptr) {
    *rows.scales = load_float(rows.given_scale, rows.given_scale_dtype, 0);
  }
  const int64_t grain = ceil_div(kElementsPerThread / 2, rows.k + 1);
  threads.for_each(rows.m, grain, [&](int64_t row) {
    std::vector<T> y(static_cast<size_t>(rows.k));
    make(row, y.data());
    if (rows.given_scale != nullptr) {
      Codes::encode(y.data(), rows.k, *rows.scales, rows.codes + row * rows.k);
    } else {
      for (int64_t group = 0; group < rows.num_groups; ++group) {
        quantize_group<Codes>(rows, row, group, y.data());
      }
    }
  });
}

}  // namespace effllm
