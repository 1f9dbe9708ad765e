// What w4a8_gemm does on the CPU around the loop over int8 of int8_gemm_block.h: 16 rows of codes
// become int8 in memory that stays in L2, and are then multiplied group by group.
//
// The loop over codes (w4a8_code_rows.h) makes a line of each row of 16 words, in their order, into
// which x is brought instead:
//
//   one or more tiles per group   a line is a tile of 64 columns
//   two groups per tile (g = 32)  a line is a tile, too, with the zero points of one of the groups;
//                                 x is 0 in the columns of the other
//
// Groups with multipliers are not summed apart: a line is a tile, of which each half has its own.
//
// Few tokens meet the codes as they are, where a loop for that is there (w4a8_code_sums.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "common/cpu_isa.h"
#include "common/math.h"
#include "gemm/int8_panels.h"
#include "gemm/packed_gemm_cpu.h"
#include "gemm/w4a8_code_rows.h"
#include "gemm/w4a8_code_sums.h"
#include "gemm/w4a8_gemm.h"

namespace effllm {

inline constexpr int kW4A8Line = kPackedCpuTileK;  // bytes
static_assert(kW4A8Line == kInt8CpuTileK);

// How K and its groups are lines.
struct W4A8Lines {
  int columns;  // of K, per line
  int64_t count, per_group;
  int64_t per_code_sum;  // whose products of codes are summed up as they are; 0: none are

  explicit W4A8Lines(const W4A8GemmParams& params)
      : columns(params.num_groups > 1 && params.group_size < kW4A8Line ? kW4A8Line / 2 : kW4A8Line),
        count(ceil_div<int64_t>(params.k, columns)),
        per_group(ceil_div<int64_t>(params.group_size, columns)),
        per_code_sum(takes_code_sums(params) ? lines_per_code_sum(params) : 0) {}

  int64_t first_of(int64_t group) const { return group * per_group; }
  int64_t count_of(int64_t group) const { return std::min(per_group, count - first_of(group)); }

  int64_t per_sum() const {
    return per_code_sum > 0 ? per_code_sum : std::max<int64_t>(per_group, 1);
  }
  int64_t num_sums() const { return ceil_div(count, per_sum()); }

 private:
  static bool takes_code_sums(const W4A8GemmParams& params) {
    constexpr int64_t kMaxTokens = 3;  // for more, loops over int8 are faster
    static_assert(kMaxTokens < kInt8AmxMinTokens);
    return kHasX86Isas && cpu_isa() >= CpuIsa::kAvx512Vnni && params.m <= kMaxTokens;
  }

  // A group of zero points or multipliers; of 32 columns' multipliers there is none.
  int64_t lines_per_code_sum(const W4A8GemmParams& params) const {
    return params.multipliers.data == nullptr ? per_group
                                              : params.multipliers.group_size / kW4A8Line;
  }
};

// x in lines: with the sums of each token's groups [sums, M], or in panels, which need none.
struct W4A8Tokens {
  struct alignas(kW4A8Line) Line {
    int8_t bytes[kW4A8Line];
  };

  template <class Threads>
  W4A8Tokens(const W4A8GemmParams& params, const W4A8Lines& cut, const Threads& threads)
      : lines(std::max<int64_t>(cut.count * params.m, 1)) {
    const bool in_panels = takes_int8_panels(params.m);
    if (!in_panels) sums.resize(std::max(cut.num_sums(), params.num_groups) * params.m);
    constexpr int64_t kGrain = 8;  // for fewer, threads cost more than they save
    threads.for_each(params.m, kGrain, [&](int64_t m) {
      const auto* row = static_cast<const int8_t*>(params.x) + m * params.k;
      for (int64_t line = 0; line < cut.count; ++line) {
        const int64_t first = line * cut.columns;
        int8_t columns[kW4A8Line] = {};
        std::memcpy(columns + first % kW4A8Line, row + first,
                    std::min<int64_t>(params.k - first, cut.columns));
        int8_t* to = lines[m * cut.count + line].bytes;
        for (int idx = 0; idx < kW4A8Line; ++idx) {
          to[idx] = columns[column_of_byte(idx / 4, idx % 4)];
        }
        if (in_panels) continue;
        int32_t sum = 0;
        for (const int8_t column : columns) sum += column;
        sums[line / cut.per_sum() * params.m + m] += sum;
      }
    });
    if (in_panels) {
      panels.emplace(lines.data()->bytes, params.m, cut.count * kW4A8Line, threads);
    }
  }

  std::vector<Line> lines;  // [M, lines]; never empty, as it is pointed into
  std::vector<int32_t> sums;
  std::optional<Int8Panels> panels;
};

// Which loop over codes; in internal linkage, as it is.
namespace {

inline W4A8CodeRowsKernel select_w4a8_code_rows_kernel() {
  constexpr W4A8CodeRowsKernel kBaseline = unpack_w4a8_rows<4>;
  if constexpr (kHasX86Isas) {
    const CpuIsa isa = cpu_isa();
    if (isa >= CpuIsa::kAvx512) return unpack_w4a8_rows_avx512;
    if (isa >= CpuIsa::kAvx2) return unpack_w4a8_rows_avx2;
  }
  return kBaseline;
}

}  // namespace

// Multipliers or zero points, of all rows and groups.
struct W4A8GroupBytes {
  explicit W4A8GroupBytes(const W4A8GemmParams& params)
      : data(params.zeros),
        stride_n(params.stride_zeros_n),
        stride_g(params.stride_zeros_g),
        num_groups(params.num_groups) {
    const W4A8Multipliers& multipliers = params.multipliers;
    if (multipliers.data == nullptr) return;
    are_multipliers = true;
    data = multipliers.data, num_groups = multipliers.num_groups;
    stride_n = multipliers.stride_n, stride_g = multipliers.stride_g;
  }

  const uint8_t* row(int64_t n) const { return data == nullptr ? nullptr : data + n * stride_n; }
  uint8_t at(int64_t n, int64_t group) const {
    return data == nullptr ? kInt4PaddingCode : data[n * stride_n + group * stride_g];
  }

  bool are_multipliers = false;
  const uint8_t* data;  // null: zero points of 8
  int64_t stride_n, stride_g, num_groups;
};

// Where the codes of the 16 rows of a block begin.
inline const int32_t* w4a8_block_words(const W4A8GemmParams& params, int64_t block) {
  constexpr int64_t kBlocks = kInt4StripRows / kInt8CpuRows, kPairs = kInt8CpuRows / 2;
  return params.qweight + block / kBlocks * params.stride_qweight_strip +
         block % kBlocks * kPairs * kPackedCpuStep;
}

// The 16 rows of a block, [16, lines] of bytes.
inline void unpack_w4a8_block(const W4A8GemmParams& params, const W4A8Lines& cut,
                              W4A8CodeRowsKernel unpack, int64_t block, int8_t* weight) {
  constexpr int kPairs = kInt8CpuRows / 2;
  const W4A8GroupBytes bytes(params);
  W4A8CodeRows rows{
      .words = w4a8_block_words(params, block),
      .num_lines = cut.count,
      .two_lines_per_tile = cut.columns < kW4A8Line,
      .groups = {},
      .are_multipliers = bytes.are_multipliers,
      .num_groups = bytes.num_groups,
      .stride_group = bytes.stride_g,
      .lines_per_run = cut.per_group,
      .groups_per_run = 1,
      .low = weight,
      .high = weight + kPairs * cut.count * kW4A8Line,
  };
  if (bytes.are_multipliers) {
    const int64_t group_size = params.multipliers.group_size;
    rows.lines_per_run = std::max<int64_t>(group_size / kW4A8Line, 1);
    rows.groups_per_run = kW4A8Line * rows.lines_per_run / group_size;
  }
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int half = 0; half < 2; ++half) {
      // Rows past N are computed and never stored: any groups will do.
      const int64_t row = block * kInt8CpuRows + pair + half * kPairs;
      rows.groups[half] = bytes.row(std::min(row, params.n - 1));
    }
    unpack(rows);
    rows.words += kPackedCpuStep;
    rows.low += cut.count * kW4A8Line;
    rows.high += cut.count * kW4A8Line;
  }
}

}  // namespace effllm
