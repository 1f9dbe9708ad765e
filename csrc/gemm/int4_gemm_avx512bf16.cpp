// The CPU's inner loop of int4_gemm for bf16 x: q - z is an integer of at most eight bits, exact in
// bf16, and vdpbf16ps adds exact products of pairs to fp32 sums. Bound by the bytes of W for up to
// four tokens, by the dot products beyond.
//
// A vector has 16 lanes of 32 bits, 4 rows x 4 pairs of columns: lane 4 r + i is row r of a "quad"
// and block i of 16 columns in the tile. In such a vector of words the codes of these rows and of
// those 8 further down, the "high" quad of a "quad pair", lie beside the code that shares a dot
// product with. x needs 16 bytes, the same for all four rows.
//
// The products of a tile and both quads are then added, i = 0 to 1 and 2 to 3, which leaves a
// vector of 8 rows x 2 halves of the tile to scale: half as many multiplications, which compete
// with dot products for the same units. Two groups in a tile are but other zeros and scales in the
// lanes of its second half.
//
// For few tokens the weights go from the words straight into the products; for more they are kept
// in L1. The order of additions is the same, so that results do not depend on the batch.
//
// In intrinsics: vector extensions have neither the dot product nor shuffles of 16-bit values by a
// variable. They are always inlined, as common/vector.h asks for.
#include <array>

#include "common/x86_intrinsics.h"
#include "gemm/int4_gemm_bf16_strip.h"

namespace effllm {
namespace {

constexpr int kPairRows = 8;    // of a quad pair
constexpr int kPairWords = 64;  // of a quad pair in one tile
constexpr int kSteps = 8;       // dot products for the 64 columns of a tile
constexpr int kPrefetchWords =
    3 * kPackedCpuTileWords;   // 6 KB: what hardware prefetches is too near
constexpr int kFewTokens = 4;  // up to which no weights are kept, and in registers at a time

// Of the low quad; the high quad begins 8 rows later.
constexpr int first_row(int pair) { return pair / 2 * 16 + pair % 2 * 4; }

// What a 16-bit half becomes by its lowest five bits: `value(bits)` as bf16.
template <class Value>
constexpr std::array<uint16_t, 32> make_table(const Value& value) {
  std::array<uint16_t, 32> table{};
  for (int bits = 0; bits < 32; ++bits) {
    table[bits] = __builtin_bit_cast(uint32_t, static_cast<float>(value(bits))) >> 16;
  }
  return table;
}

constexpr auto kCodesMinusEight = make_table([](int bits) { return bits % 16 - 8; });
constexpr auto kMinusSixteen = make_table([](int bits) { return bits - 16; });

// Zeros and scales of some groups, by group: of each quad pair the low four, then the high four.
class Groups {
 public:
  // Tiles of groups that are not there yet load them, for the rows of some quad pairs.
  template <Int4Zeros kZeros>
  void prepare(const Int4Bf16Strip& strip, int64_t tile, int first_pair, int last_pair) {
    const int64_t group = strip.two_groups_per_tile ? 2 * tile : tile / strip.tiles_per_group;
    if (group == first_group_ + kCount || tile == 0) {
      first_group_ = group;
      for (int pair = first_pair; pair < last_pair; ++pair) {
        for (int high = 0; high < 2; ++high) {
          const int64_t row = first_row(pair) + 8 * high;
          const int to = pair * kPairRows + 4 * high;
          if constexpr (kZeros != Int4Zeros::kEight) {
            transpose(strip.decoding + row * strip.stride_decoding_slot + group,
                      strip.stride_decoding_slot, zeros_[0] + to);
          }
          transpose(strip.scales + row * strip.stride_scales + group, strip.stride_scales,
                    scales_[0] + to);
        }
      }
    }
    current_ = static_cast<int>(group - first_group_);
    second_ = current_ + (strip.two_groups_per_tile ? 1 : 0);
  }

  // In the lanes of words: a row's four blocks, two in each half.
  __m512i zeros(int pair, int high) const {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 16, 16, 1, 1, 17, 17, 2, 2, 18, 18, 3, 3, 19, 19);
    return pick(zeros_, pair, _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * high)));
  }

  // In the lanes of added products: halves of the low row, then of the high row.
  __m512 scales(int pair) const {
    return _mm512_castsi512_ps(pick(
        scales_, pair, _mm512_setr_epi32(0, 16, 4, 20, 1, 17, 5, 21, 2, 18, 6, 22, 3, 19, 7, 23)));
  }

 private:
  static constexpr int kCount = 8;

  // Four rows of groups into groups of four rows. Zeros are no floats: they are only moved.
  static void transpose(const float* table, int64_t stride, float* to) {
    for (int group = 0; group < kCount; group += 4, table += 4, to += 4 * kPackedCpuRows) {
      __m128 a = _mm_loadu_ps(table), b = _mm_loadu_ps(table + stride);
      __m128 c = _mm_loadu_ps(table + 2 * stride), d = _mm_loadu_ps(table + 3 * stride);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + kPackedCpuRows, b);
      _mm_storeu_ps(to + 2 * kPackedCpuRows, c);
      _mm_storeu_ps(to + 3 * kPackedCpuRows, d);
    }
  }

  // Of the quad pair's eight values for the first half and, from lane 16 on, for the second.
  __m512i pick(const float (*table)[kPackedCpuRows], int pair, __m512i lanes) const {
    const auto row = [&](int group) {
      const auto* at = reinterpret_cast<const __m256i*>(table[group] + pair * kPairRows);
      return _mm512_castsi256_si512(_mm256_loadu_si256(at));
    };
    return _mm512_permutex2var_epi32(row(current_), lanes, row(second_));
  }

  float zeros_[kCount][kPackedCpuRows], scales_[kCount][kPackedCpuRows];
  int64_t first_group_ = 0;
  int current_ = 0, second_ = 0;
};

// Rows n .. n + 3 and n + 8 .. n + 11 of one tile.
template <Int4Zeros kZeros>
struct QuadPair {
  QuadPair(const Int4Bf16Strip& strip, const Groups& groups, int64_t tile, int pair)
      : words(strip.words + tile * kPackedCpuTileWords + pair * kPairWords),
        scales(groups.scales(pair)) {
    if constexpr (kZeros != Int4Zeros::kEight) {
      for (int high = 0; high < 2; ++high) zeros[high] = groups.zeros(pair, high);
    }
  }

  const int32_t* words;
  __m512 scales;
  __m512i zeros[2];
};

// bf16 of the differences of the low and high halves, which may be any of -255 .. 15.
inline __m512i to_bf16_pairs(__m512i differences) {
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(differences, 16), 16);
  const __m512i high = _mm512_srai_epi32(differences, 16);
  const __m512i low_bits = _mm512_castps_si512(_mm512_cvtepi32_ps(low));
  const __m512i high_bits = _mm512_castps_si512(_mm512_cvtepi32_ps(high));
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low_bits, 16), high_bits);
}

inline __m512i look_up(const std::array<uint16_t, 32>& table, __m512i bits) {
  return _mm512_permutexvar_epi16(bits, _mm512_loadu_si512(table.data()));
}

// Calls `body(low or high quad, step, weights)` for all of a quad pair's weights in a tile.
template <Int4Zeros kZeros, class Body>
inline void dequantize(const QuadPair<kZeros>& pair, const Body& body) {
  for (int line = 0; line < kPairWords; line += 16) {
    __builtin_prefetch(pair.words + kPrefetchWords + line, 0, 2);
  }
  // Words [row, c, i] of one c, in lanes [row, i]. By loads, as shuffles are the scarce resource.
  const auto load_words = [&](int c) {
    const auto row = [&](int idx) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(pair.words + 16 * idx + 4 * c));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(row(1), row(0))),
                              _mm256_set_m128i(row(3), row(2)), 1);
  };
  // The codes of one quad are the lower half of each byte; bytes 0 and 2 of a word are one pair of
  // columns, bytes 1 and 3 the next. Look-ups ignore what else there is, which spares the masks.
  const auto quad = [&](int high, int step, __m512i words) {
    const __m512i codes = _mm512_and_si512(words, _mm512_set1_epi32(0x0f0f0f0f));
    if constexpr (kZeros == Int4Zeros::kEight) {
      body(high, step, look_up(kCodesMinusEight, words));
      body(high, step + 1, look_up(kCodesMinusEight, _mm512_srli_epi32(words, 8)));
    } else if constexpr (kZeros == Int4Zeros::kUpTo16) {
      // 16 + q - zero, which is 0 .. 31. No byte carries into the next.
      const __m512i differences = _mm512_add_epi8(codes, pair.zeros[high]);
      body(high, step, look_up(kMinusSixteen, differences));
      body(high, step + 1, look_up(kMinusSixteen, _mm512_srli_epi32(differences, 8)));
    } else {
      const __m512i bytes = _mm512_set1_epi32(0x00ff00ff);
      const __m512i zeros =
          _mm512_and_si512(_mm512_sub_epi8(_mm512_set1_epi8(16), pair.zeros[high]), bytes);
      const auto subtract = [&](__m512i values) {
        return to_bf16_pairs(_mm512_sub_epi16(_mm512_and_si512(values, bytes), zeros));
      };
      body(high, step, subtract(codes));
      body(high, step + 1, subtract(_mm512_srli_epi32(codes, 8)));
    }
  };
  for (int c = 0; c < 4; ++c) {
    const __m512i words = load_words(c);
    quad(0, 2 * c, words);
    quad(1, 2 * c, _mm512_srli_epi32(words, 4));
  }
}

inline __m512 add_products(__m512 sum, __m512i weights, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}

// The eight columns of a step, for each of four rows.
inline __m512i load_step(const bfloat16* x, int step) {
  return _mm512_broadcast_i32x4(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + step * (kPackedCpuTileK / kSteps))));
}

// The products of a quad pair, scaled and added to its sums.
inline void add_scaled(__m512& sums, __m512 low, __m512 high, __m512 scales) {
  const __m512 even = _mm512_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0));
  const __m512 odd = _mm512_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1));
  sums = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scales, sums);
}

// Adds both halves of each row, and stores what are now the strip's sums.
inline void store_pair(const Int4Bf16Strip& strip, int token, int pair, __m512 sums) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, sums);
  __m128 a = _mm_load_ps(lanes), b = _mm_load_ps(lanes + 4);
  __m128 c = _mm_load_ps(lanes + 8), d = _mm_load_ps(lanes + 12);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  float* out = strip.sums + token * kPackedCpuRows + first_row(pair);
  _mm_storeu_ps(out, _mm_add_ps(a, b));
  _mm_storeu_ps(out + 8, _mm_add_ps(c, d));
}

// Up to four tokens.
template <Int4Zeros kZeros, int kTokens>
void multiply_few(const Int4Bf16Strip& strip) {
  const int num_pairs = (strip.num_rows + 15) / 16 * 2;
  __m512 sums[kPackedCpuRows / kPairRows][kTokens] = {};
  Groups groups;
  for (int64_t tile = 0; tile < strip.num_tiles; ++tile) {
    groups.prepare<kZeros>(strip, tile, 0, num_pairs);
    const bfloat16* x = strip.x + tile * strip.stride_x_tile;
    for (int idx = 0; idx < num_pairs; ++idx) {
      const QuadPair<kZeros> pair(strip, groups, tile, idx);
      __m512 products[2][kTokens] = {};
      dequantize(pair, [&](int high, int step, __m512i weights) {
        for (int token = 0; token < kTokens; ++token) {
          products[high][token] = add_products(products[high][token], weights,
                                               load_step(x + token * kPackedCpuTileK, step));
        }
      });
      for (int token = 0; token < kTokens; ++token) {
        add_scaled(sums[idx][token], products[0][token], products[1][token], pair.scales);
      }
    }
  }
  for (int pair = 0; pair < num_pairs; ++pair) {
    for (int token = 0; token < kTokens; ++token) store_pair(strip, token, pair, sums[pair][token]);
  }
}

// The weights of 16 rows and one tile, in L1.
struct KeptWeights {
  static constexpr int kPairs = 2;

  template <Int4Zeros kZeros>
  void load(const Int4Bf16Strip& strip, const Groups& groups, int64_t tile, int first_pair) {
    for (int idx = 0; idx < kPairs; ++idx) {
      const QuadPair<kZeros> pair(strip, groups, tile, first_pair + idx);
      dequantize(pair,
                 [&](int high, int step, __m512i values) { weights[step][idx][high] = values; });
      scales[idx] = pair.scales;
    }
  }

  template <int kTokens>
  void multiply(const bfloat16* x, __m512 (*sums)[kPairs]) const {
    __m512 products[kTokens][kPairs][2] = {};
    for (int step = 0; step < kSteps; ++step) {
      for (int token = 0; token < kTokens; ++token) {
        const __m512i values = load_step(x + token * kPackedCpuTileK, step);
        for (int pair = 0; pair < kPairs; ++pair) {
          for (int high = 0; high < 2; ++high) {
            __m512& sum = products[token][pair][high];
            sum = add_products(sum, weights[step][pair][high], values);
          }
        }
      }
    }
    for (int token = 0; token < kTokens; ++token) {
      for (int pair = 0; pair < kPairs; ++pair) {
        add_scaled(sums[token][pair], products[token][pair][0], products[token][pair][1],
                   scales[pair]);
      }
    }
  }

  // A function of its own, as else the constants of dequantisation take registers from its loop.
  __attribute__((noinline)) void multiply_all(const bfloat16* x, int num_tokens,
                                              __m512 (*sums)[kPairs]) const {
    int token = 0;
    for (; token + kFewTokens <= num_tokens; token += kFewTokens) {
      multiply<kFewTokens>(x + token * kPackedCpuTileK, sums + token);
    }
    for (; token < num_tokens; ++token) multiply<1>(x + token * kPackedCpuTileK, sums + token);
  }

  __m512i weights[kSteps][kPairs][2];
  __m512 scales[kPairs];
};

template <Int4Zeros kZeros>
void multiply_many(const Int4Bf16Strip& strip) {
  __m512 sums[kInt4Bf16MaxTokens][KeptWeights::kPairs];
  KeptWeights kept;
  Groups groups;
  for (int first = 0; first * kPairRows < strip.num_rows; first += KeptWeights::kPairs) {
    const int last = first + KeptWeights::kPairs;
    for (int token = 0; token < strip.num_tokens; ++token) {
      for (__m512& sum : sums[token]) sum = _mm512_setzero_ps();
    }
    for (int64_t tile = 0; tile < strip.num_tiles; ++tile) {
      groups.prepare<kZeros>(strip, tile, first, last);
      kept.load<kZeros>(strip, groups, tile, first);
      kept.multiply_all(strip.x + tile * strip.stride_x_tile, strip.num_tokens, sums);
    }
    for (int token = 0; token < strip.num_tokens; ++token) {
      for (int pair = first; pair < last; ++pair) {
        store_pair(strip, token, pair, sums[token][pair - first]);
      }
    }
  }
}

template <Int4Zeros kZeros>
void multiply_strip(const Int4Bf16Strip& strip) {
  switch (strip.num_tokens) {
    case 1:
      return multiply_few<kZeros, 1>(strip);
    case 2:
      return multiply_few<kZeros, 2>(strip);
    case 3:
      return multiply_few<kZeros, 3>(strip);
    case 4:
      return multiply_few<kZeros, 4>(strip);
    default:
      return multiply_many<kZeros>(strip);
  }
}

}  // namespace

void int4_strip_avx512bf16(const Int4Bf16Strip& strip, Int4Zeros kind_of_zeros) {
  switch (kind_of_zeros) {
    case Int4Zeros::kEight:
      return multiply_strip<Int4Zeros::kEight>(strip);
    case Int4Zeros::kUpTo16:
      return multiply_strip<Int4Zeros::kUpTo16>(strip);
    case Int4Zeros::kUpTo255:
      return multiply_strip<Int4Zeros::kUpTo255>(strip);
  }
}

}  // namespace effllm
