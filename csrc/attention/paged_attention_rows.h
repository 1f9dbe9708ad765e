// The CPU's inner loop of paged_attention: query rows meet a tile of keys, in fp32.
//
// One source for every vector width, compiled by `paged_attention.cpp` for the oldest processors
// and by `paged_attention_<isa>.cpp` with that ISA's flags. All of it has internal linkage and
// calls no inline function that has not: see common/vector.h.
#pragma once

#include <cstdint>

#include "common/vector.h"

namespace effllm {

inline constexpr int kAttentionTileKeys = 64;
// Of the transposed keys: an odd number of cache lines, or one key's values would all compete for a
// few sets of L1.
inline constexpr int kAttentionKeyStride = 80;

struct AttentionTile {
  int64_t dim;  // D, a multiple of 8
  float scale, softcap;
  const float* queries;  // [rows, D]
  const float* keys;     // [D, 80], of which 64 are used
  const float* values;   // [64, D]
  float* sums;           // [rows, D], of exp(score - maximum) * value so far
  float* maxima;         // [rows], largest score so far
  float* totals;         // [rows], of exp(score - maximum)
};

// One step of the online softmax: rows first_row .. meet keys begin .. end - 1 of the tile, at
// least one.
using AttentionRowsKernel = void (*)(const AttentionTile& tile, int64_t first_row, int64_t num_rows,
                                     int begin, int end);

// Defined in paged_attention_<isa>.cpp, on x86-64 alone.
void attention_rows_avx2(const AttentionTile& tile, int64_t first_row, int64_t num_rows, int begin,
                         int end);
void attention_rows_avx512(const AttentionTile& tile, int64_t first_row, int64_t num_rows,
                           int begin, int end);

namespace {

// exp of values up to 0, as 2^n exp(r) with |r| <= ln(2) / 2, where the Taylor series to the
// seventh power is exact to 2^-27. Less than exp(-87), almost the smallest normal number, is 0.
template <int kWidth>
inline FloatVector<kWidth> exp_of_negative(FloatVector<kWidth> x) {
  using Float = FloatVector<kWidth>;
  using Words = Vector<uint32_t, kWidth>;
  constexpr float kSmallest = -87.0f, kRound = 0x1.8p23f;  // adding kRound rounds to an integer
  const auto vanishes = x < kSmallest;
  const Float clamped = vanishes ? splat<kWidth>(kSmallest) : x;  // NaN stays
  const Float shifted = clamped * 0x1.715476p+0f + kRound;
  const Float n = shifted - kRound;
  // ln(2) in two parts, the first with so few bits that its product with n is exact.
  const Float r = (clamped - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  Float series = r * (1.0f / 5040) + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  // The low bits of `shifted` are n: shifted up and biased, the exponent of 2^n.
  const Float power =
      reinterpret_cast<Float>((reinterpret_cast<Words>(shifted) << 23) + (uint32_t{127} << 23));
  return vanishes ? Float{} : series * power;
}

// Some columns of add_weighted_rows. Sums of 32 rows first, in registers: shorter chains round
// less.
template <int kLanes, int kVectors, int kOuts>
inline void add_weighted_columns(const float* weights, int64_t stride_weights, const float* rows,
                                 int64_t stride_rows, int64_t count, int64_t stride_out,
                                 float* out) {
  using Float = FloatVector<kLanes>;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t last = first + 32 < count ? first + 32 : count;
    Float sums[kOuts][kVectors] = {};
    for (int64_t row = first; row < last; ++row) {
      for (int idx = 0; idx < kVectors; ++idx) {
        const float* from = rows + row * stride_rows + idx * kLanes;
        const Float values = kOuts == 1 ? load_vector<Float>(from) : load_once<Float>(from);
        for (int o = 0; o < kOuts; ++o) {
          sums[o][idx] = weights[o * stride_weights + row] * values + sums[o][idx];
        }
      }
    }
    for (int o = 0; o < kOuts; ++o) {
      for (int idx = 0; idx < kVectors; ++idx) {
        float* to = out + o * stride_out + idx * kLanes;
        store_vector(load_vector<Float>(to) + sums[o][idx], to);
      }
    }
  }
}

// out[o, 0 .. width) += the sum over rows of weights[o, row] * rows[row, 0 .. width), for kOuts
// values of o; width a multiple of 8. Both matrix products are made of it: no sum crosses lanes,
// and each is the same whatever kOuts is.
template <int kWidth, int kOuts>
inline void add_weighted_rows(const float* weights, int64_t stride_weights, const float* rows,
                              int64_t stride_rows, int64_t count, int64_t width, float* out) {
  constexpr int kVectors = 8 / kOuts;  // eight registers of sums hide the latency of adding
  constexpr int kTail = kWidth < 8 ? kWidth : 8;
  int64_t col = 0;
  for (; col + kVectors * kWidth <= width; col += kVectors * kWidth) {
    add_weighted_columns<kWidth, kVectors, kOuts>(weights, stride_weights, rows + col, stride_rows,
                                                  count, width, out + col);
  }
  if constexpr (kVectors * kWidth > 8) {
    for (; col < width; col += 8) {
      add_weighted_columns<kTail, 8 / kTail, kOuts>(weights, stride_weights, rows + col,
                                                    stride_rows, count, width, out + col);
    }
  }
}

// Products of one row with a tile's keys become weights, exp(score - maximum): 0 where invisible.
template <int kWidth>
inline void weigh(const AttentionTile& tile, int64_t row, int begin, int end, float* products) {
  using Float = FloatVector<kWidth>;
  constexpr float kInfinity = __builtin_inff();
  constexpr int kVectors = kAttentionTileKeys / kWidth;
  for (int key = 0; key < kAttentionTileKeys; ++key) {
    // What an invisible key holds, even NaN, has no influence.
    const float score = products[key] * tile.scale;
    products[key] = key >= begin && key < end ? score : -kInfinity;
  }
  if (tile.softcap > 0.0f) {
    for (int key = begin; key < end; ++key) {
      products[key] = tile.softcap * __builtin_tanhf(products[key] / tile.softcap);
    }
  }

  Float scores[kVectors], maxima = splat<kWidth>(tile.maxima[row]);
  for (int idx = 0; idx < kVectors; ++idx) {
    scores[idx] = load_vector<Float>(products + idx * kWidth);
    maxima = scores[idx] > maxima ? scores[idx] : maxima;
  }
  float maximum = maxima[0];
  for (int lane = 1; lane < kWidth; ++lane) {
    maximum = maxima[lane] > maximum ? maxima[lane] : maximum;
  }

  // While all scores are -inf, any finite base does: -inf - -inf would make them NaN.
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  Float totals{};
  for (int idx = 0; idx < kVectors; ++idx) {
    scores[idx] = exp_of_negative<kWidth>(scores[idx] - base);
    totals = totals + scores[idx];
    store_vector(scores[idx], products + idx * kWidth);
  }
  const float rescale = __builtin_expf(tile.maxima[row] - base);
  float total = tile.totals[row] * rescale;
  for (int lane = 0; lane < kWidth; ++lane) total += totals[lane];
  tile.maxima[row] = maximum;
  tile.totals[row] = total;
  if (rescale != 1.0f) {
    for (int64_t d = 0; d < tile.dim; ++d) tile.sums[row * tile.dim + d] *= rescale;
  }
}

template <int kWidth, int kRows>
void update_block(const AttentionTile& tile, int64_t row, int begin, int end) {
  float weights[kRows][kAttentionTileKeys] = {};
  add_weighted_rows<kWidth, kRows>(tile.queries + row * tile.dim, tile.dim, tile.keys,
                                   kAttentionKeyStride, tile.dim, kAttentionTileKeys, weights[0]);
  for (int idx = 0; idx < kRows; ++idx) weigh<kWidth>(tile, row + idx, begin, end, weights[idx]);
  // Only visible values are read: the weight 0 would not make NaN vanish.
  add_weighted_rows<kWidth, kRows>(weights[0] + begin, kAttentionTileKeys,
                                   tile.values + begin * tile.dim, tile.dim, end - begin, tile.dim,
                                   tile.sums + row * tile.dim);
}

// Four rows at a time use what they load of keys and values four times.
template <int kWidth>
void update_rows(const AttentionTile& tile, int64_t first_row, int64_t num_rows, int begin,
                 int end) {
  const int64_t last_row = first_row + num_rows;
  int64_t row = first_row;
  for (; row + 4 <= last_row; row += 4) update_block<kWidth, 4>(tile, row, begin, end);
  for (; row < last_row; ++row) update_block<kWidth, 1>(tile, row, begin, end);
}

}  // namespace
}  // namespace effllm
