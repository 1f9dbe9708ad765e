// The CPU's inner loop over packed 4-bit codes: up to 64 rows of W times a few tokens, in fp32. A
// "decoder" makes weights of codes: int4_gemm_strip.h and lut4_gemm_strip.h have one each.
//
// One source for every vector width: `<op>.cpp` compiles it for the oldest processors and
// `<op>_<isa>.cpp` with that ISA's flags. All of it has internal linkage and calls no inline
// function that has not: see common/vector.h.
//
// Sixteen consecutive words of a tile hold two rows, n (for one n % 8 of a 16-row block) in the
// low and n + 8 in the high half of each byte. Byte b of word 4 q + i is column
// 16 i + 2 q + 8 (b % 2) + b / 2. Floats are made of such bytes by interleaving, which leaves the
// columns of a "step" of 16, one i, in the order q, b ("fragment order"). x is kept in that order,
// so no other shuffle is needed.
//
// A token's sum is built in the same order whatever the tokens beside it, so that results do not
// depend on the batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/vector.h"
#include "gemm/packed_strip.h"

namespace effllm {

inline constexpr int kPackedCpuStep = 16;            // columns, and words that hold a pair of rows
inline constexpr uint32_t kPackedCpuPadding = 0x80;  // or-ed to a code's byte
inline constexpr int kPackedCpuMaxTokens = 32;       // of one call: their sums stay in L1

// Slots are in the order of their words: rows n, n + 8 for n = 0 .. 7, then the next block of 16.
// x is in fragment order.
using PackedStrip = StripOf<float>;
using PackedStripKernel = void (*)(const PackedStrip&);

namespace {

// Elements of a and b in turn, from the low or the high half of each 16 bytes.
template <bool kHigh, class V, std::size_t... kIdx>
inline V interleave(V a, V b, std::index_sequence<kIdx...>) {
  constexpr std::size_t kCount = sizeof...(kIdx), kBlock = kCount * 16 / sizeof(V);
  constexpr auto source = [](std::size_t idx) {
    return idx / kBlock * kBlock + (kHigh ? kBlock / 2 : 0) + idx % kBlock / 2 +
           (idx % 2 == 1 ? kCount : 0);
  };
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, source(kIdx)...);
#else  // GCC before 12
  return __builtin_shuffle(a, b, V{source(kIdx)...});
#endif
}

// Step kStep of one row: 32-bit lanes of the bytes first, second, third and fourth of that step,
// the first lowest. Each vector of bytes belongs to 16 words as they lie in a tile.
template <int kStep, int kWidth, class Bytes>
inline FloatVector<kWidth> lanes_of_step(Bytes first, Bytes second, Bytes third, Bytes fourth) {
  using Halves = Vector<uint16_t, kWidth>;
  constexpr std::make_index_sequence<4 * kWidth> kByteIndices;
  const auto lower = interleave<(kStep >= 2)>(first, second, kByteIndices);
  const auto upper = interleave<(kStep >= 2)>(third, fourth, kByteIndices);
  return reinterpret_cast<FloatVector<kWidth>>(
      interleave<(kStep % 2 == 1)>(reinterpret_cast<Halves>(lower), reinterpret_cast<Halves>(upper),
                                   std::make_index_sequence<2 * kWidth>()));
}

// Rows n and n + 8 in one tile. Scales and `decoding` are those of the tile's first group, sums
// those of all tokens.
template <int kWidth>
struct RowPair {
  const int32_t* words;
  const uint32_t* padding;
  const float *low_decoding, *high_decoding, *low_scales, *high_scales;
  int64_t stride_decoding_group;
  FloatVector<kWidth>*low_sums, *high_sums;
};

// Calls `body(column of x, weights of row n, weights of row n + 8)` for the vectors of a group,
// which is all of a tile or half of it.
template <class Decoder, int kGroup, int kGroups, int kWidth, class Body>
inline void decode(const RowPair<kWidth>& pair, const Body& body) {
  using Words = Vector<uint32_t, kWidth>;
  constexpr int kSteps = 4 / kGroups, kFirst = kGroup * kSteps;
  const Decoder low_row(pair.low_decoding + kGroup * pair.stride_decoding_group);
  const Decoder high_row(pair.high_decoding + kGroup * pair.stride_decoding_group);
  for (int lane = 0; lane < kPackedCpuStep; lane += kWidth) {
    const Words words = load_vector<Words>(pair.words + lane);
    Words low = words & 0x0f0f0f0fu, high = (words >> 4) & 0x0f0f0f0fu;
    if constexpr (Decoder::kTakesPadding) {
      const Words padding = load_vector<Words>(pair.padding + lane);
      low |= padding;
      high |= padding;
    }
    const auto step = [&]<int kStep>(std::integral_constant<int, kStep>) {
      body(kStep * kPackedCpuStep + lane, low_row.template weights<kStep>(low),
           high_row.template weights<kStep>(high));
    };
    step(std::integral_constant<int, kFirst>());
    step(std::integral_constant<int, kFirst + 1>());
    if constexpr (kSteps == 4) {
      step(std::integral_constant<int, kFirst + 2>());
      step(std::integral_constant<int, kFirst + 3>());
    }
  }
}

// Products of a row pair with kTokens tokens, summed in registers. The scale comes last.
template <int kWidth, int kTokens>
struct PairSums {
  using Float = FloatVector<kWidth>;

  void add(const float* x, Float low_weights, Float high_weights) {
    for (int token = 0; token < kTokens; ++token) {
      const float* from = x + token * kPackedCpuTileK;
      const Float values = kTokens < 4 ? load_vector<Float>(from) : load_once<Float>(from);
      low[token] = low_weights * values + low[token];
      high[token] = high_weights * values + high[token];
    }
  }

  void scale_into(Float* low_sums, Float* high_sums, Float low_scale, Float high_scale) const {
    for (int token = 0; token < kTokens; ++token) {
      low_sums[token] = low[token] * low_scale + low_sums[token];
      high_sums[token] = high[token] * high_scale + high_sums[token];
    }
  }

  Float low[kTokens] = {}, high[kTokens] = {};
};

// A group of a pair times kTokens tokens, at most four: their sums fit in registers, and the
// weights go straight from the words into them.
template <class Decoder, int kTokens, int kGroup, int kGroups, int kWidth>
inline void multiply_group(const RowPair<kWidth>& pair, const float* x) {
  PairSums<kWidth, kTokens> sums;
  decode<Decoder, kGroup, kGroups>(
      pair, [&](int column, auto low, auto high) { sums.add(x + column, low, high); });
  sums.scale_into(pair.low_sums, pair.high_sums, splat<kWidth>(pair.low_scales[kGroup]),
                  splat<kWidth>(pair.high_scales[kGroup]));
}

// A group's weights in L1, in the order in which they are summed, for more tokens than four.
template <class Decoder, int kGroup, int kGroups, int kWidth>
struct KeptGroup {
  using Float = FloatVector<kWidth>;
  static constexpr int kColumns = kPackedCpuTileK / kGroups;

  explicit KeptGroup(const RowPair<kWidth>& pair)
      : low_scale(splat<kWidth>(pair.low_scales[kGroup])),
        high_scale(splat<kWidth>(pair.high_scales[kGroup])) {
    Float(*next)[2] = weights;
    decode<Decoder, kGroup, kGroups>(pair, [&](int, Float low, Float high) {
      next[0][0] = low;
      next[0][1] = high;
      ++next;
    });
  }

  template <int kTokens>
  void multiply(const RowPair<kWidth>& pair, const float* x, int first_token) const {
    PairSums<kWidth, kTokens> sums;
    x += first_token * kPackedCpuTileK + kGroup * kColumns;
    const Float(*next)[2] = weights;
    for (int lane = 0; lane < kPackedCpuStep; lane += kWidth) {
      for (int column = lane; column < kColumns; column += kPackedCpuStep, ++next) {
        sums.add(x + column, next[0][0], next[0][1]);
      }
    }
    sums.scale_into(pair.low_sums + first_token, pair.high_sums + first_token, low_scale,
                    high_scale);
  }

  // A function of its own, as else the constants of decoding take registers from its loop.
  __attribute__((noinline)) void multiply_all(const RowPair<kWidth>& pair, const float* x,
                                              int num_tokens) const {
    int token = 0;
    for (; token + 4 <= num_tokens; token += 4) multiply<4>(pair, x, token);
    for (; token < num_tokens; ++token) multiply<1>(pair, x, token);
  }

  Float weights[kColumns / kWidth][2], low_scale, high_scale;
};

// All tiles of pairs first_pair .. last_pair - 1, added to sums [pairs, 2, num_tokens]. kTokens is
// num_tokens, or 0 for more than four.
template <class Decoder, int kTokens, int kGroups, int kWidth>
void add_products(const PackedStrip& strip, int first_pair, int last_pair,
                  FloatVector<kWidth>* sums) {
  const int num_tokens = kTokens == 0 ? strip.num_tokens : kTokens;
  for (int64_t tile = 0; tile < strip.num_tiles; ++tile) {
    const float* x = strip.x + tile * strip.stride_x_tile;
    const uint32_t* padding = strip.padding + (tile + 1 == strip.num_tiles ? kPackedCpuStep : 0);
    const int64_t group = kGroups == 2 ? 2 * tile : tile / strip.tiles_per_group;
    for (int idx = first_pair; idx < last_pair; ++idx) {
      const int64_t low = 2 * idx * strip.stride_scales + group;
      const int64_t high = low + strip.stride_scales;
      FloatVector<kWidth>* low_sums = sums + (idx - first_pair) * 2 * num_tokens;
      const float* decoding = strip.decoding + 2 * idx * strip.stride_decoding_slot +
                              group * strip.stride_decoding_group;
      const RowPair<kWidth> pair{
          .words = strip.words + tile * kPackedCpuTileWords + idx * kPackedCpuStep,
          .padding = padding,
          .low_decoding = decoding,
          .high_decoding = decoding + strip.stride_decoding_slot,
          .low_scales = strip.scales + low,
          .high_scales = strip.scales + high,
          .stride_decoding_group = strip.stride_decoding_group,
          .low_sums = low_sums,
          .high_sums = low_sums + num_tokens};
      if constexpr (kTokens == 0) {
        KeptGroup<Decoder, 0, kGroups, kWidth>(pair).multiply_all(pair, x, num_tokens);
        if constexpr (kGroups == 2) {
          KeptGroup<Decoder, 1, kGroups, kWidth>(pair).multiply_all(pair, x, num_tokens);
        }
      } else {
        multiply_group<Decoder, kTokens, 0, kGroups>(pair, x);
        if constexpr (kGroups == 2) multiply_group<Decoder, kTokens, 1, kGroups>(pair, x);
      }
    }
  }
}

template <class Decoder, int kWidth, int kGroups>
void multiply_strip(const PackedStrip& strip) {
  // 16 KB with AVX2, half of L1: all rows of up to 8 tokens, which streams through the weights in
  // the order they lie in, or 16 rows of the most tokens.
  FloatVector<kWidth> sums[kPackedCpuRows * 8];
  const int num_tokens = strip.num_tokens;
  const int num_pairs = (strip.num_rows + 15) / 16 * 8, step = num_tokens <= 8 ? num_pairs : 8;
  for (int first_pair = 0; first_pair < num_pairs; first_pair += step) {
    const int last_pair = first_pair + step;
    for (int idx = 0; idx < step * 2 * num_tokens; ++idx) sums[idx] = FloatVector<kWidth>{};
    switch (num_tokens) {
      case 1:
        add_products<Decoder, 1, kGroups, kWidth>(strip, first_pair, last_pair, sums);
        break;
      case 2:
        add_products<Decoder, 2, kGroups, kWidth>(strip, first_pair, last_pair, sums);
        break;
      case 3:
        add_products<Decoder, 3, kGroups, kWidth>(strip, first_pair, last_pair, sums);
        break;
      case 4:
        add_products<Decoder, 4, kGroups, kWidth>(strip, first_pair, last_pair, sums);
        break;
      default:
        add_products<Decoder, 0, kGroups, kWidth>(strip, first_pair, last_pair, sums);
    }
    const FloatVector<kWidth>* lanes = sums;
    for (int slot = 2 * first_pair; slot < 2 * last_pair; ++slot) {
      for (int token = 0; token < num_tokens; ++token, ++lanes) {
        float sum = 0.0f;
        for (int lane = 0; lane < kWidth; ++lane) sum += (*lanes)[lane];
        strip.sums[token * kPackedCpuRows + slot] = sum;
      }
    }
  }
}

template <template <int> class Decoder, int kWidth>
void multiply_strip(const PackedStrip& strip) {
  strip.two_groups_per_tile ? multiply_strip<Decoder<kWidth>, kWidth, 2>(strip)
                            : multiply_strip<Decoder<kWidth>, kWidth, 1>(strip);
}

}  // namespace
}  // namespace effllm
