// What w4a8_gemm does on the CPU around the loop over int8 of int8_gemm_block.h: 16 rows of codes
// become int8 in memory that stays in L2, and are then multiplied group by group.
//
// Sixteen consecutive words of a tile hold two rows, n in the low and n + 8 in the high half of
// each byte. So 64 bytes become a line of either row by a mask, without a shuffle, in the order of
// those words, into which x is brought instead:
//
//   one or more tiles per group   a line is a tile of 64 columns
//   two groups per tile (g = 32)  a line is a tile, too, with the zero points of one of the groups;
//                                 x is 0 in the columns of the other
//
// Groups with multipliers are not summed apart: a line is a tile, of which each half has its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "common/math.h"
#include "common/vector.h"
#include "gemm/int8_panels.h"
#include "gemm/packed_gemm_cpu.h"
#include "gemm/w4a8_gemm.h"

namespace effllm {

inline constexpr int kW4A8Line = kPackedCpuTileK;  // bytes
static_assert(kW4A8Line == kInt8CpuTileK);

// How K and its groups are lines.
struct W4A8Lines {
  int columns;  // of K, per line
  int64_t count, per_group;

  explicit W4A8Lines(const W4A8GemmParams& params)
      : columns(params.num_groups > 1 && params.group_size < kW4A8Line ? kW4A8Line / 2 : kW4A8Line),
        count(ceil_div<int64_t>(params.k, columns)),
        per_group(ceil_div<int64_t>(params.group_size, columns)) {}

  int64_t tile(int64_t line) const { return line * columns / kW4A8Line; }
  int64_t first_of(int64_t group) const { return group * per_group; }
  int64_t count_of(int64_t group) const { return std::min(per_group, count - first_of(group)); }
};

// x in lines: with the sums of each token's groups [groups, M], or in panels, which need none.
struct W4A8Tokens {
  struct alignas(kW4A8Line) Line {
    int8_t bytes[kW4A8Line];
  };

  template <class Threads>
  W4A8Tokens(const W4A8GemmParams& params, const W4A8Lines& cut, const Threads& threads)
      : lines(std::max<int64_t>(cut.count * params.m, 1)) {
    const bool in_panels = takes_int8_panels(params.m);
    if (!in_panels) sums.resize(params.num_groups * params.m);
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
        sums[line / cut.per_group * params.m + m] += sum;
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

// A line of rows n and n + 8: codes less zero points, which are int8.
inline void unpack_w4a8_line(const int32_t* words, uint8_t low_zero, uint8_t high_zero, int8_t* low,
                             int8_t* high) {
  uint8_t bytes[kW4A8Line];
  std::memcpy(bytes, words, kW4A8Line);
  for (int idx = 0; idx < kW4A8Line; ++idx) {
    low[idx] = static_cast<int8_t>((bytes[idx] & 15) - low_zero);
  }
  for (int idx = 0; idx < kW4A8Line; ++idx) {
    high[idx] = static_cast<int8_t>((bytes[idx] >> 4) - high_zero);
  }
}

// What makes int8 of a row's codes, pairs of them at a time: q * m - 8 * m. With 128 more that is 8
// .. 233, and no byte touches the one above it.
class W4A8PairTerms {
 public:
  using Pairs = Vector<uint16_t, 4>;  // of the codes in four words

  // Words 0 and 1 of four have columns of the first half of a line.
  W4A8PairTerms(int first, int second) {
    constexpr uint64_t kEach = 0x0001000100010001;
    const Vector<uint64_t, 4> halves = {first * kEach, second * kEach};
    factors_ = load_vector<Pairs>(&halves);
    offsets_ = (128 - 8 * factors_) * 0x0101;
  }

  Pairs operator()(Pairs codes) const { return ((codes & 0x0f0f) * factors_ + offsets_) ^ 0x8080; }

 private:
  Pairs factors_, offsets_;
};

// A line of rows n and n + 8: codes less 8, times multipliers.
inline void unpack_w4a8_line(const int32_t* words, const W4A8PairTerms& low_terms,
                             const W4A8PairTerms& high_terms, int8_t* low, int8_t* high) {
  constexpr int kBytes = sizeof(W4A8PairTerms::Pairs);
  for (int byte = 0; byte < kW4A8Line; byte += kBytes) {
    const auto codes = load_vector<W4A8PairTerms::Pairs>(words + byte / 4);
    store_vector(low_terms(codes), low + byte);
    store_vector(high_terms(codes >> 4), high + byte);
  }
}

// Rows n and n + 8, `words` being the first of theirs.
inline void unpack_w4a8_rows(const W4A8Multipliers& multipliers, const W4A8Lines& cut,
                             const int32_t* words, const int64_t (&rows)[2], int8_t* low,
                             int8_t* high) {
  const int64_t lines = std::max<int64_t>(multipliers.group_size / kW4A8Line, 1);
  const int64_t groups = kW4A8Line * lines / multipliers.group_size;  // in so many lines: 1 or 2
  for (int64_t line = 0, group = 0; line < cut.count; group += groups) {
    const int64_t second = std::min(group + groups, multipliers.num_groups) - 1;
    const auto terms = [&](int64_t row) {
      const uint8_t* of_row = multipliers.data + row * multipliers.stride_n;
      return W4A8PairTerms(of_row[group * multipliers.stride_g],
                           of_row[second * multipliers.stride_g]);
    };
    const W4A8PairTerms low_terms = terms(rows[0]), high_terms = terms(rows[1]);
    for (const int64_t last = std::min(line + lines, cut.count); line < last; ++line) {
      unpack_w4a8_line(words + line * kInt4TileWords, low_terms, high_terms, low + line * kW4A8Line,
                       high + line * kW4A8Line);
    }
  }
}

// The 16 rows of a block, [16, lines] of bytes.
inline void unpack_w4a8_block(const W4A8GemmParams& params, const W4A8Lines& cut, int64_t block,
                              int8_t* weight) {
  constexpr int64_t kBlocks = kInt4StripRows / kInt8CpuRows;
  constexpr int kPairs = kInt8CpuRows / 2;
  const int32_t* words = params.qweight + block / kBlocks * params.stride_qweight_strip +
                         block % kBlocks * kPairs * kPackedCpuStep;
  for (int pair = 0; pair < kPairs; ++pair) {
    // Rows past N are computed and never stored: any terms will do.
    const int64_t first_row = block * kInt8CpuRows + pair;
    const int64_t rows[2] = {std::min(first_row, params.n - 1),
                             std::min(first_row + 8, params.n - 1)};
    int8_t* const low = weight + pair * cut.count * kW4A8Line;
    int8_t* const high = low + kPairs * cut.count * kW4A8Line;
    if (params.multipliers.data != nullptr) {
      unpack_w4a8_rows(params.multipliers, cut, words + pair * kPackedCpuStep, rows, low, high);
      continue;
    }
    const uint8_t* zeros[2] = {};
    if (params.zeros != nullptr) {
      for (int half = 0; half < 2; ++half) {
        zeros[half] = params.zeros + rows[half] * params.stride_zeros_n;
      }
    }
    for (int64_t line = 0; line < cut.count; ++line) {
      const auto zero = [&](int half) -> uint8_t {
        if (params.zeros == nullptr) return kInt4PaddingCode;
        return zeros[half][line / cut.per_group * params.stride_zeros_g];
      };
      unpack_w4a8_line(words + cut.tile(line) * kInt4TileWords + pair * kPackedCpuStep, zero(0),
                       zero(1), low + line * kW4A8Line, high + line * kW4A8Line);
    }
  }
}

}  // namespace effllm
