// The CPU's inner loop of paged_attention: query rows meet a tile of keys, in fp32.
//
// One source for every vector width, compiled by `paged_attention.cpp` for the oldest processors
// and by `paged_attention_<isa>.cpp` with that ISA's flags. All of it has internal linkage and
// calls no inline function that has not: see common/vector.h.
//
// Keys and values become floats in registers, four query rows at a time, which for the usual
// groups is once. A row's result does not depend on how many rows go together: every product has
// its own chain of additions in the same order.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "attention/kv_vectors.h"

namespace effllm {

inline constexpr int kAttentionTileKeys = 64;
// What D is padded to: two vectors, the pair that kv_vectors.h loads, of the widest ISA.
inline constexpr int64_t kAttentionDimStep = 32;

// Pointers to rows of a cache and what else decodes them, by key of the tile.
struct KvRows {
  const void* rows[kAttentionTileKeys];
  float scales[kAttentionTileKeys];  // kPower of KvVectors included; 1 without scales
  float zeros[kAttentionTileKeys];   // of int4, else 0
};

// Of a query row whose scores lose `slope` for each position between it and the key.
struct AlibiRow {
  float slope;
  int64_t position;
};

struct AttentionTile {
  int64_t dim;  // D, padded with zeros
  float scale, softcap;
  const float* queries;  // [rows, D]
  const KvRows* keys;
  const KvRows* values;
  // Those of the next tile, to be prefetched; null if there is none.
  const KvRows* next_keys;
  const KvRows* next_values;
  int64_t first_key;      // position of the tile's key 0
  const AlibiRow* alibi;  // [rows], or null
  // Where scores are wanted: [rows, stride_scores], from the tile's key 0 on, -inf where invisible.
  // Null if they are not.
  float* scores;
  int64_t stride_scores;
  float* sums;    // [rows, D], of exp(score - maximum) * value so far; null: scores are all
  float* maxima;  // [rows], largest score so far
  float* totals;  // [rows], of exp(score - maximum)
};

struct AttentionKernels {
  // One step of the online softmax: rows first_row .. meet keys begin .. end - 1 of the tile, at
  // least one.
  void (*update_rows)(const AttentionTile& tile, int64_t first_row, int64_t num_rows, int begin,
                      int end);
  // The same where the tile's rows are what `decode_row` made of them; not scaled.
  void (*update_decoded_rows)(const AttentionTile& tile, int64_t first_row, int64_t num_rows,
                              int begin, int end);
  // `out` has room for `dim` floats.
  void (*decode_row)(const void* row, float zero, int64_t dim, float* out);
  // sums[key] += the sum over rows of exp(scores[row, key] - bases[row]), in the order of rows, for
  // kAttentionTileKeys keys. Scores are not much larger than their row's base.
  void (*add_weights)(const float* scores, int64_t stride_scores, const float* bases,
                      int64_t num_rows, float* sums);
  int element_bits;  // of the cache
  // Of each pair of neighbouring elements, the second is in the second half of queries and sums.
  bool splits_neighbours;
};

// For a cache of a checked dtype. Defined in paged_attention_<isa>.cpp, on x86-64 alone.
AttentionKernels attention_kernels_avx2(DType kv_dtype);
AttentionKernels attention_kernels_avx512(DType kv_dtype);
// For queries of bf16 and no cache of other floats.
AttentionKernels attention_kernels_avx512bf16(DType kv_dtype);

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

// Into L2, a tile ahead: hardware prefetches neither over the end of a page nor the first lines of
// the next.
template <class Kv>
inline void prefetch_row(const KvRows* next, int key, int64_t dim) {
  if (next == nullptr) return;
  const char* row = static_cast<const char*>(next->rows[key]);
  for (int64_t byte = 0; byte < dim * KvVectors<Kv>::kBits / 8; byte += 64) {
    __builtin_prefetch(row + byte, 0, 2);
  }
}

// Lane i of the result: a[i] + a[i ^ kStep] where i has not the bit kStep, else the same of b.
template <int kWidth, int kStep, int... kLanes>
inline FloatVector<kWidth> add_across(FloatVector<kWidth> a, FloatVector<kWidth> b,
                                      std::integer_sequence<int, kLanes...>) {
  using Int = Vector<int32_t, kWidth>;
  const Int here = {(kLanes & kStep ? kWidth + kLanes : kLanes)...};
  const Int across = {(kLanes & kStep ? kWidth + (kLanes ^ kStep) : kLanes ^ kStep)...};
  return __builtin_shuffle(a, b, here) + __builtin_shuffle(a, b, across);
}

// The sums of kWidth vectors' lanes: lane i is that of vectors[i].
template <int kWidth, int kStep = 1>
inline FloatVector<kWidth> sum_lanes(FloatVector<kWidth>* vectors) {
  if constexpr (kStep == kWidth) {
    return vectors[0];
  } else {
    for (int idx = 0; idx < kWidth / kStep; idx += 2) {
      vectors[idx / 2] = add_across<kWidth, kStep>(vectors[idx], vectors[idx + 1],
                                                   std::make_integer_sequence<int, kWidth>());
    }
    return sum_lanes<kWidth, 2 * kStep>(vectors);
  }
}

// Room behind the products of a row for blocks of keys that end beyond the tile.
constexpr int kProductStride = kAttentionTileKeys + 32;

// Sums of the lanes of [kRows, keys] vectors into the products of as many keys.
template <int kWidth, int kRows>
inline void store_products(FloatVector<kWidth>* sums, float* products) {
  constexpr int kKeys = kWidth / kRows;
  const FloatVector<kWidth> dots = sum_lanes<kWidth>(sums);
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(products + r * kProductStride,
                     reinterpret_cast<const float*>(&dots) + r * kKeys, kKeys * sizeof(float));
  }
}

// products[r, key] = queries[row + r] * keys[key], for keys begin .. end - 1.
template <class Kv, int kWidth, int kRows>
inline void multiply_keys(const AttentionTile& tile, int64_t row, int begin, int end,
                          float* products) {
  using Float = FloatVector<kWidth>;
  constexpr int kKeys = kWidth / kRows;
  const int64_t half = tile.dim / (2 * kWidth);
  const float* queries = tile.queries + row * tile.dim;
  for (int first = begin; first < end; first += kKeys) {
    const void* rows[kKeys];
    float zeros[kKeys];
    for (int k = 0; k < kKeys; ++k) {
      const int key = first + k < end ? first + k : end - 1;
      rows[k] = tile.keys->rows[key];
      zeros[k] = tile.keys->zeros[key];
      prefetch_row<Kv>(tile.next_keys, key, tile.dim);
    }
    Float sums[kWidth] = {};
    for (int64_t idx = 0; idx < half; ++idx) {
      Float query[kRows][2];
      for (int r = 0; r < kRows; ++r) {
        const float* from = queries + r * tile.dim + idx * kWidth;
        query[r][0] = load_once<Float>(from);
        query[r][1] = load_once<Float>(from + half * kWidth);
      }
      for (int k = 0; k < kKeys; ++k) {
        Float pair[2];
        load_pair<Kv, kWidth>(rows[k], idx, half, zeros[k], pair);
        for (int r = 0; r < kRows; ++r) {
          Float& sum = sums[r * kKeys + k];
          sum = query[r][0] * pair[0] + sum;
          sum = query[r][1] * pair[1] + sum;
        }
      }
    }
    store_products<kWidth, kRows>(sums, products + first);
  }
}

template <int kWidth>
inline void add_to_sums(const AttentionTile& tile, int64_t row, int64_t pair,
                        const FloatVector<kWidth> (&values)[2]) {
  for (int side = 0; side < 2; ++side) {
    float* to = tile.sums + row * tile.dim + side * (tile.dim / 2) + pair * kWidth;
    store_vector(load_vector<FloatVector<kWidth>>(to) + values[side], to);
  }
}

// sums[row + r] += the sum over keys of weights[r, key] * values[key], in some columns: the pairs
// of vectors from `pair` on.
template <class Kv, int kWidth, int kRows, int kPairs>
inline void add_weighted_columns(const AttentionTile& tile, const float* weights, int64_t row,
                                 int64_t pair, int begin, int end) {
  using Float = FloatVector<kWidth>;
  const int64_t half = tile.dim / (2 * kWidth);
  Float sums[kRows][kPairs][2] = {};
  for (int key = begin; key < end; ++key) {
    if (pair == 0) prefetch_row<Kv>(tile.next_values, key, tile.dim);
    for (int idx = 0; idx < kPairs; ++idx) {
      Float values[2];
      load_pair<Kv, kWidth>(tile.values->rows[key], pair + idx, half, tile.values->zeros[key],
                            values);
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights[r * kProductStride + key];
        sums[r][idx][0] = weight * values[0] + sums[r][idx][0];
        sums[r][idx][1] = weight * values[1] + sums[r][idx][1];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int idx = 0; idx < kPairs; ++idx) {
      add_to_sums<kWidth>(tile, row + r, pair + idx, sums[r][idx]);
    }
  }
}

// All columns.
template <class Kv, int kWidth, int kRows>
inline void add_weighted_values(const AttentionTile& tile, const float* weights, int64_t row,
                                int begin, int end) {
  // Eight registers of sums hide the latency of adding; of 32, sixteen share what they load.
  constexpr int kPairs = (kWidth == 16 ? 8 : 4) / kRows;
  const int64_t half = tile.dim / (2 * kWidth);
  int64_t pair = 0;
  for (; pair + kPairs <= half; pair += kPairs) {
    add_weighted_columns<Kv, kWidth, kRows, kPairs>(tile, weights, row, pair, begin, end);
  }
  for (; pair < half; ++pair) {
    add_weighted_columns<Kv, kWidth, kRows, 1>(tile, weights, row, pair, begin, end);
  }
}

// Products of one row with a tile's keys become scores, -inf where invisible.
inline void score(const AttentionTile& tile, int64_t row, int begin, int end, float* products) {
  constexpr float kInfinity = __builtin_inff();
  for (int key = 0; key < kAttentionTileKeys; ++key) {
    // What an invisible key holds, even NaN, has no influence.
    const float score = products[key] * tile.keys->scales[key] * tile.scale;
    products[key] = key >= begin && key < end ? score : -kInfinity;
  }
  if (tile.softcap > 0.0f) {
    for (int key = begin; key < end; ++key) {
      products[key] = tile.softcap * __builtin_tanhf(products[key] / tile.softcap);
    }
  }

  if (tile.alibi != nullptr) {
    const AlibiRow alibi = tile.alibi[row];
    for (int key = begin; key < end; ++key) {
      const int64_t distance = alibi.position - tile.first_key - key;
      products[key] -= alibi.slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
  }
  if (tile.scores != nullptr) {
    __builtin_memcpy(tile.scores + row * tile.stride_scores, products,
                     kAttentionTileKeys * sizeof(float));
  }
}

// Scores of one row become weights, exp(score - maximum), times the values' scales: of no meaning
// where invisible.
template <int kWidth>
inline void weigh(const AttentionTile& tile, int64_t row, float* products) {
  using Float = FloatVector<kWidth>;
  constexpr float kInfinity = __builtin_inff();
  constexpr int kVectors = kAttentionTileKeys / kWidth;
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
  for (int key = 0; key < kAttentionTileKeys; ++key) products[key] *= tile.values->scales[key];
}

// Products of some rows become weights, unless their scores are all that is wanted: then false.
template <int kWidth, int kRows>
inline bool weigh_rows(const AttentionTile& tile, int64_t row, int begin, int end,
                       float* products) {
  for (int r = 0; r < kRows; ++r) {
    score(tile, row + r, begin, end, products + r * kProductStride);
    if (tile.sums != nullptr) weigh<kWidth>(tile, row + r, products + r * kProductStride);
  }
  return tile.sums != nullptr;
}

template <class Kv, int kWidth, int kRows>
void update_block(const AttentionTile& tile, int64_t row, int begin, int end) {
  float weights[kRows * kProductStride];
  multiply_keys<Kv, kWidth, kRows>(tile, row, begin, end, weights);
  if (!weigh_rows<kWidth, kRows>(tile, row, begin, end, weights)) return;
  // Only visible values are read: the weight 0 would not make NaN vanish.
  add_weighted_values<Kv, kWidth, kRows>(tile, weights, row, begin, end);
}

// Four rows at a time use what they load of keys and values four times.
template <class Kv, int kWidth>
void update_rows(const AttentionTile& tile, int64_t first_row, int64_t num_rows, int begin,
                 int end) {
  const int64_t last_row = first_row + num_rows;
  int64_t row = first_row;
  for (; row + 4 <= last_row; row += 4) update_block<Kv, kWidth, 4>(tile, row, begin, end);
  for (; row < last_row; ++row) update_block<Kv, kWidth, 1>(tile, row, begin, end);
}

template <class Kv, int kWidth>
void decode_row(const void* row, float zero, int64_t dim, float* out) {
  const int64_t half = dim / (2 * kWidth);
  for (int64_t idx = 0; idx < half; ++idx) {
    FloatVector<kWidth> pair[2];
    load_pair<Kv, kWidth>(row, idx, half, zero, pair);
    store_vector(pair[0], out + idx * kWidth);
    store_vector(pair[1], out + (half + idx) * kWidth);
  }
}

template <int kWidth>
void add_weights(const float* scores, int64_t stride_scores, const float* bases, int64_t num_rows,
                 float* sums) {
  using Float = FloatVector<kWidth>;
  for (int key = 0; key < kAttentionTileKeys; key += kWidth) {
    Float sum = load_vector<Float>(sums + key);
    for (int64_t row = 0; row < num_rows; ++row) {
      const Float of_row = load_vector<Float>(scores + row * stride_scores + key);
      const Float weights = exp_of_negative<kWidth>(of_row - bases[row]);
      sum = sum + (of_row == -__builtin_inff() ? Float{} : weights);  // also if the base is NaN
    }
    store_vector(sum, sums + key);
  }
}

template <class Kv, int kWidth>
AttentionKernels attention_kernels_of() {
  return {update_rows<Kv, kWidth>, update_rows<float, kWidth>, decode_row<Kv, kWidth>,
          add_weights<kWidth>,     KvVectors<Kv>::kBits,       std::is_same_v<Kv, KvInt4>};
}

template <int kWidth>
AttentionKernels attention_kernels(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kFloat32:
      return attention_kernels_of<float, kWidth>();
    case DType::kBFloat16:
      return attention_kernels_of<bfloat16, kWidth>();
    case DType::kFloat16:
      return attention_kernels_of<float16, kWidth>();
    case DType::kFloat8E4M3:
      return attention_kernels_of<KvE4M3, kWidth>();
    case DType::kInt8:
      return attention_kernels_of<KvInt8, kWidth>();
    default:
      return attention_kernels_of<KvInt4, kWidth>();
  }
}

}  // namespace
}  // namespace effllm
