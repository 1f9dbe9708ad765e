// The CPU's inner loop of paged_attention for bf16 queries: vdpbf16ps adds products of bf16 pairs
// to fp32 sums, twice as many as fp32 has. Keys and codes are exact in bf16; weights, with their
// values' scales, are rounded to it, as tensor cores want them.
//
// A vector of words has 16 lanes of two elements. Of keys, these are of one row: neighbours where
// the cache's bytes give them so, else the same place in the row's two halves (kv_vectors.h). Of
// values, they are the same element of two rows, so that a pair of weights is their other factor.
//
// In intrinsics: vector extensions have no dot product. They are always inlined, as
// common/vector.h asks for.
#include "attention/paged_attention_rows.h"

namespace effllm {
namespace {

constexpr int kWidth = 16;
constexpr int kMaxVectors = 8;  // of pairs, in the longest row
constexpr int kWeightVectors = kAttentionTileKeys / (2 * kWidth);
constexpr uint32_t kHighHalves = 0xaaaaaaaau;
alignas(64) constexpr char kZeroRow[512] = {};  // as long as rows of bf16 get

// Floats that bf16 holds exactly, in pairs: `low` in the lower halves.
inline __m512i pair_up(FloatVector<kWidth> low, FloatVector<kWidth> high) {
  return _mm512_mask_blend_epi16(kHighHalves, _mm512_srli_epi32(reinterpret_cast<__m512i>(low), 16),
                                 reinterpret_cast<__m512i>(high));
}

inline FloatVector<kWidth> add_products(FloatVector<kWidth> sum, __m512i a, __m512i b) {
  return reinterpret_cast<FloatVector<kWidth>>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

// What a row's codes are looked up in: int4's codes minus zero by the lowest four bits of five.
template <class Kv>
inline __m512i decoding_table(float zero) {
  if constexpr (!std::is_same_v<Kv, KvInt4>) return _mm512_setzero_si512();
  const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 values = _mm512_sub_ps(codes, _mm512_set1_ps(zero));
  return _mm512_broadcast_i64x4(
      _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16)));
}

// Vector `idx` of a row of pairs.
template <class Kv>
inline __m512i load_words(const void* row, int64_t idx, int64_t half, __m512i table) {
  if constexpr (std::is_same_v<Kv, bfloat16>) {
    return _mm512_loadu_si512(static_cast<const char*>(row) + 64 * idx);
  } else if constexpr (std::is_same_v<Kv, KvInt4>) {
    const auto bytes =
        reinterpret_cast<__m512i>(widen<kWidth>(static_cast<const uint8_t*>(row) + idx * kWidth));
    // The upper code in the higher half; look-ups ignore what else there is.
    return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
  } else {
    return pair_up(KvVectors<Kv>::template vector<kWidth>(row, idx),
                   KvVectors<Kv>::template vector<kWidth>(row, half + idx));
  }
}

// Both elements of the lanes of two rows, with those of the first row in the lower halves.
template <class Kv>
inline void load_two_rows(const void* const* rows, int64_t idx, int64_t half, const __m512i* tables,
                          __m512i (&words)[2]) {
  if constexpr (std::is_same_v<Kv, bfloat16> || std::is_same_v<Kv, KvInt4>) {
    const __m512i a = load_words<Kv>(rows[0], idx, half, tables[0]);
    const __m512i b = load_words<Kv>(rows[1], idx, half, tables[1]);
    words[0] = _mm512_mask_blend_epi16(kHighHalves, a, _mm512_slli_epi32(b, 16));
    words[1] = _mm512_mask_blend_epi16(kHighHalves, _mm512_srli_epi32(a, 16), b);
  } else {
    for (int side = 0; side < 2; ++side) {
      words[side] = pair_up(KvVectors<Kv>::template vector<kWidth>(rows[0], side * half + idx),
                            KvVectors<Kv>::template vector<kWidth>(rows[1], side * half + idx));
    }
  }
}

// As in paged_attention_rows.h.
template <class Kv, int kRows>
inline void multiply_keys_bf16(const AttentionTile& tile, int64_t row, int begin, int end,
                               float* products) {
  using Float = FloatVector<kWidth>;
  constexpr int kKeys = kWidth / kRows;
  const int64_t half = tile.dim / (2 * kWidth);
  __m512i queries[kMaxVectors][kRows];
  for (int r = 0; r < kRows; ++r) {
    const float* query = tile.queries + (row + r) * tile.dim;
    for (int64_t idx = 0; idx < half; ++idx) {
      queries[idx][r] = pair_up(load_vector<Float>(query + idx * kWidth),
                                load_vector<Float>(query + (half + idx) * kWidth));
    }
  }
  for (int first = begin; first < end; first += kKeys) {
    const void* rows[kKeys];
    __m512i tables[kKeys];
    for (int k = 0; k < kKeys; ++k) {
      const int key = first + k < end ? first + k : end - 1;
      rows[k] = tile.keys->rows[key];
      tables[k] = decoding_table<Kv>(tile.keys->zeros[key]);
      prefetch_row<Kv>(tile.next_keys, key, tile.dim);
    }
    Float sums[kWidth] = {};
    for (int64_t idx = 0; idx < half; ++idx) {
      for (int k = 0; k < kKeys; ++k) {
        const __m512i words = load_words<Kv>(rows[k], idx, half, tables[k]);
        for (int r = 0; r < kRows; ++r) {
          Float& sum = sums[r * kKeys + k];
          sum = add_products(sum, queries[idx][r], words);
        }
      }
    }
    store_products<kWidth, kRows>(sums, products + first);
  }
}

// Weights of two keys at a time, as bf16 pairs.
template <class Kv, int kRows, int kPairs>
inline void add_weighted_columns_bf16(const AttentionTile& tile, const __m512i* weights,
                                      int64_t row, int64_t pair, int begin, int end) {
  using Float = FloatVector<kWidth>;
  const int64_t half = tile.dim / (2 * kWidth);
  Float sums[kRows][kPairs][2] = {};
  for (int key = begin; key < end; key += 2) {
    // Not a value beyond the visible ones: the weight 0 would not make NaN vanish.
    const bool two = key + 1 < end;
    const void* const rows[] = {tile.values->rows[key],
                                two ? tile.values->rows[key + 1] : kZeroRow};
    const __m512i tables[] = {decoding_table<Kv>(tile.values->zeros[key]),
                              decoding_table<Kv>(two ? tile.values->zeros[key + 1] : 0.0f)};
    if (pair == 0) {
      prefetch_row<Kv>(tile.next_values, key, tile.dim);
      if (two) prefetch_row<Kv>(tile.next_values, key + 1, tile.dim);
    }
    for (int idx = 0; idx < kPairs; ++idx) {
      __m512i words[2];
      load_two_rows<Kv>(rows, pair + idx, half, tables, words);
      for (int r = 0; r < kRows; ++r) {
        const auto* lanes = reinterpret_cast<const int32_t*>(weights + r * kWeightVectors);
        const __m512i weight = _mm512_set1_epi32(lanes[(key - begin) / 2]);
        for (int side = 0; side < 2; ++side) {
          sums[r][idx][side] = add_products(sums[r][idx][side], weight, words[side]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int idx = 0; idx < kPairs; ++idx) {
      add_to_sums<kWidth>(tile, row + r, pair + idx, sums[r][idx]);
    }
  }
}

// To bf16, in pairs of neighbouring keys from `begin` on.
template <int kRows>
inline void pair_weights(float* weights, int begin, int end, __m512i* pairs) {
  for (int r = 0; r < kRows; ++r) {
    float* row = weights + r * kProductStride;
    row[end] = 0.0f;  // the second of a pair, if their number is odd
    for (int vector = 0; begin + vector * 2 * kWidth < end; ++vector) {
      const float* from = row + begin + vector * 2 * kWidth;
      pairs[r * kWeightVectors + vector] = reinterpret_cast<__m512i>(
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kWidth), _mm512_loadu_ps(from)));
    }
  }
}

template <class Kv, int kRows>
void update_block_bf16(const AttentionTile& tile, int64_t row, int begin, int end) {
  float weights[kRows * kProductStride];
  multiply_keys_bf16<Kv, kRows>(tile, row, begin, end, weights);
  if (!weigh_rows<kWidth, kRows>(tile, row, begin, end, weights)) return;
  __m512i pairs[kRows * kWeightVectors];
  pair_weights<kRows>(weights, begin, end, pairs);
  constexpr int kPairs = 8 / kRows;
  const int64_t half = tile.dim / (2 * kWidth);
  int64_t pair = 0;
  for (; pair + kPairs <= half; pair += kPairs) {
    add_weighted_columns_bf16<Kv, kRows, kPairs>(tile, pairs, row, pair, begin, end);
  }
  for (; pair < half; ++pair) {
    add_weighted_columns_bf16<Kv, kRows, 1>(tile, pairs, row, pair, begin, end);
  }
}

template <class Kv>
void update_rows_bf16(const AttentionTile& tile, int64_t first_row, int64_t num_rows, int begin,
                      int end) {
  const int64_t last_row = first_row + num_rows;
  int64_t row = first_row;
  for (; row + 4 <= last_row; row += 4) update_block_bf16<Kv, 4>(tile, row, begin, end);
  for (; row < last_row; ++row) update_block_bf16<Kv, 1>(tile, row, begin, end);
}

// Into a row of bf16, whose pairs are the same.
template <class Kv>
void decode_row_bf16(const void* row, float zero, int64_t dim, float* out) {
  const int64_t half = dim / (2 * kWidth);
  const __m512i table = decoding_table<Kv>(zero);
  for (int64_t idx = 0; idx < half; ++idx) {
    _mm512_storeu_si512(out + idx * kWidth, load_words<Kv>(row, idx, half, table));
  }
}

template <class Kv>
AttentionKernels kernels_of() {
  constexpr bool kNeighbours = std::is_same_v<Kv, bfloat16> || std::is_same_v<Kv, KvInt4>;
  return {update_rows_bf16<Kv>, update_rows_bf16<bfloat16>, decode_row_bf16<Kv>,
          add_weights<kWidth>,  KvVectors<Kv>::kBits,       kNeighbours};
}

}  // namespace

AttentionKernels attention_kernels_avx512bf16(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kBFloat16:
      return kernels_of<bfloat16>();
    case DType::kFloat8E4M3:
      return kernels_of<KvE4M3>();
    case DType::kInt8:
      return kernels_of<KvInt8>();
    default:
      return kernels_of<KvInt4>();
  }
}

}  // namespace effllm
