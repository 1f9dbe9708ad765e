// What the CPU's paged_attention keeps of a set of keys, and how two sets become one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace effllm {

// The online softmax of some rows over some keys.
struct RowStates {
  static constexpr float kNoScore = -std::numeric_limits<float>::infinity();

  static int64_t size(int64_t num_rows, int64_t dim) { return num_rows * (dim + 2); }

  RowStates(float* memory, int64_t num_rows, int64_t dim)
      : num_rows(num_rows),
        dim(dim),
        sums(memory),
        maxima(sums + num_rows * dim),
        totals(maxima + num_rows) {}

  void clear() {
    std::fill_n(sums, num_rows * dim, 0.0f);
    std::fill_n(maxima, num_rows, kNoScore);
    std::fill_n(totals, num_rows, 0.0f);
  }

  // Adds what later keys gave.
  void merge(const RowStates& later) {
    for (int64_t row = 0; row < num_rows; ++row) {
      if (later.maxima[row] == kNoScore && later.totals[row] == 0.0f) continue;
      const float maximum = later.maxima[row] > maxima[row] ? later.maxima[row] : maxima[row];
      const float base = maximum == kNoScore ? 0.0f : maximum;
      const float ours = std::exp(maxima[row] - base);
      const float theirs = std::exp(later.maxima[row] - base);
      for (int64_t d = row * dim; d < (row + 1) * dim; ++d) {
        sums[d] = sums[d] * ours + later.sums[d] * theirs;
      }
      totals[row] = totals[row] * ours + later.totals[row] * theirs;
      maxima[row] = maximum;
    }
  }

  int64_t num_rows, dim;
  float* sums;    // [num_rows, dim], of exp(score - maximum) * value
  float* maxima;  // largest score of each row
  float* totals;  // of exp(score - maximum)
};

}  // namespace effllm
