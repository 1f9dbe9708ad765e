// The CPU's inner loop over weights of a byte each, e4m3 or int8: up to 16 rows of W times a few
// tokens, in fp32.
//
// One source for every vector width, compiled as packed_gemm_strip.h is: internal linkage, and no
// inline function that has not.
//
// A token's sum is built in the same order whatever the tokens beside it, so that results do not
// depend on the batch.
#pragma once

#include <cstdint>

#include "common/vector.h"
#include "common/vector_convert.h"

namespace effllm {

inline constexpr int kFp8CpuRows = 16;       // a whole part of the rows of a block of scales
inline constexpr int kFp8CpuMaxTokens = 32;  // of one call: their sums stay in L1
inline constexpr int kFp8CpuTileK = 128;     // columns that have a scale

struct Fp8Block {
  const uint8_t* weight;
  int64_t stride_weight;
  int num_rows;
  int64_t k;

  const float* x;  // [num_tiles, tokens, 128], zero past K
  int64_t stride_x_tile;
  int num_tokens;

  // By which the sums of a tile are multiplied; null: 1.
  const float* x_scales;  // [num_tiles, tokens]
  int64_t stride_x_scales;
  const float* w_scales;    // [rows, num_tiles], one row more than there are
  int64_t stride_w_scales;  // 0: rows share them

  float* sums;  // [num_tokens, 16 rows], out; of e4m3 2^8 times too small (kE4M3VectorPower)
};

using Fp8BlockKernel = void (*)(const Fp8Block&);

// Defined in <op>_<isa>.cpp, on x86-64 alone.
void fp8_block_avx2(const Fp8Block& block);
void fp8_block_avx512(const Fp8Block& block);
void int8_weight_block_avx2(const Fp8Block& block);
void int8_weight_block_avx512(const Fp8Block& block);

namespace {

// How codes become floats.
struct E4M3Decoder {
  template <int kWidth>
  static FloatVector<kWidth> vector(const uint8_t* from) {
    return e4m3_vector<kWidth, true>(from);
  }
};

struct Int8Decoder {
  template <int kWidth>
  static FloatVector<kWidth> vector(const uint8_t* from) {
    return int8_vector<kWidth>(from);
  }
};

// A tile's part of two rows of W, decoded when it is used; of a last tile a copy with zeros.
template <class Decoder>
class Fp8RowPair {
 public:
  Fp8RowPair(const Fp8Block& block, int first_row, int64_t tile) {
    const int64_t first = tile * kFp8CpuTileK, left = block.k - first;
    for (int idx = 0; idx < 2; ++idx) {
      // The row after the last one stands in for what nobody reads.
      const int row = first_row + idx < block.num_rows ? first_row + idx : first_row;
      rows_[idx] = block.weight + row * block.stride_weight + first;
      if (left >= kFp8CpuTileK) continue;
      __builtin_memset(copies_[idx], 0, kFp8CpuTileK);
      __builtin_memcpy(copies_[idx], rows_[idx], left);
      rows_[idx] = copies_[idx];
    }
  }

  template <int kWidth>
  FloatVector<kWidth> vector(int idx, int column) const {
    return Decoder::template vector<kWidth>(rows_[idx] + column);
  }

 private:
  const uint8_t* rows_[2];
  uint8_t copies_[2][kFp8CpuTileK];
};

// The same decoded once, for more tokens than four.
template <int kVectorWidth>
class Fp8KeptPair {
 public:
  template <class Decoder>
  explicit Fp8KeptPair(const Fp8RowPair<Decoder>& pair) {
    for (int column = 0; column < kFp8CpuTileK; column += kVectorWidth) {
      for (int idx = 0; idx < 2; ++idx) {
        store_vector(pair.template vector<kVectorWidth>(idx, column), weights_[idx] + column);
      }
    }
  }

  template <int kWidth>
  FloatVector<kWidth> vector(int idx, int column) const {
    return load_once<FloatVector<kWidth>>(weights_[idx] + column);
  }

 private:
  float weights_[2][kFp8CpuTileK];
};

// Two rows of a tile times kTokens tokens: a product is added to [tokens, 2] sums.
template <int kWidth, int kTokens, class Pair>
inline void add_products(const Fp8Block& block, const Pair& pair, int first_row, int64_t tile,
                         int first_token, FloatVector<kWidth>* sums) {
  using Float = FloatVector<kWidth>;
  const float* x = block.x + tile * block.stride_x_tile + first_token * kFp8CpuTileK;
  Float partial[kTokens][2] = {};
  for (int column = 0; column < kFp8CpuTileK; column += kWidth) {
    const Float low = pair.template vector<kWidth>(0, column);
    const Float high = pair.template vector<kWidth>(1, column);
    for (int token = 0; token < kTokens; ++token) {
      const Float values = load_once<Float>(x + token * kFp8CpuTileK + column);
      partial[token][0] = low * values + partial[token][0];
      partial[token][1] = high * values + partial[token][1];
    }
  }
  float w_scales[2] = {1.0f, 1.0f};
  if (block.w_scales != nullptr) {
    const float* row_scales = block.w_scales + first_row * block.stride_w_scales + tile;
    w_scales[0] = row_scales[0], w_scales[1] = row_scales[block.stride_w_scales];
  }
  for (int token = 0; token < kTokens; ++token) {
    const float x_scale = block.x_scales == nullptr
                              ? 1.0f
                              : block.x_scales[tile * block.stride_x_scales + first_token + token];
    for (int idx = 0; idx < 2; ++idx) {
      // One product, which is the one that is added: of two, compilers fuse another one with the
      // addition where they know that x has no scales, as for some numbers of tokens.
      Float& sum = sums[(first_token + token) * 2 + idx];
      sum = partial[token][idx] * splat<kWidth>(w_scales[idx] * x_scale) + sum;
    }
  }
}

// Few tokens: along a row at once, which streams through the weights in the order they lie in.
template <int kWidth, int kTokens, class Decoder>
inline void multiply_rows(const Fp8Block& block, int64_t num_tiles, FloatVector<kWidth>* sums) {
  for (int row = 0; row < block.num_rows; row += 2, sums += 2 * kTokens) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const Fp8RowPair<Decoder> pair(block, row, tile);
      add_products<kWidth, kTokens>(block, pair, row, tile, 0, sums);
    }
  }
}

// More tokens: all rows of a tile at once, as the tokens' part of it stays in L1.
template <int kWidth, class Decoder>
inline void multiply_tiles(const Fp8Block& block, int64_t num_tiles, FloatVector<kWidth>* sums) {
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int row = 0; row < block.num_rows; row += 2) {
      const Fp8KeptPair<kWidth> pair(Fp8RowPair<Decoder>(block, row, tile));
      FloatVector<kWidth>* pair_sums = sums + row * block.num_tokens;
      int token = 0;
      for (; token + 4 <= block.num_tokens; token += 4) {
        add_products<kWidth, 4>(block, pair, row, tile, token, pair_sums);
      }
      for (; token < block.num_tokens; ++token) {
        add_products<kWidth, 1>(block, pair, row, tile, token, pair_sums);
      }
    }
  }
}

template <int kWidth, class Decoder = E4M3Decoder>
void multiply_block(const Fp8Block& block) {
  FloatVector<kWidth> sums[kFp8CpuRows * kFp8CpuMaxTokens];  // [pairs, tokens, 2]
  const int num_pairs = (block.num_rows + 1) / 2;
  for (int idx = 0; idx < num_pairs * block.num_tokens * 2; ++idx) {
    sums[idx] = FloatVector<kWidth>{};
  }
  const int64_t num_tiles = (block.k + kFp8CpuTileK - 1) / kFp8CpuTileK;
  switch (block.num_tokens) {
    case 1:
      multiply_rows<kWidth, 1, Decoder>(block, num_tiles, sums);
      break;
    case 2:
      multiply_rows<kWidth, 2, Decoder>(block, num_tiles, sums);
      break;
    case 3:
      multiply_rows<kWidth, 3, Decoder>(block, num_tiles, sums);
      break;
    case 4:
      multiply_rows<kWidth, 4, Decoder>(block, num_tiles, sums);
      break;
    default:
      multiply_tiles<kWidth, Decoder>(block, num_tiles, sums);
  }
  const FloatVector<kWidth>* lanes = sums;
  for (int pair = 0; pair < num_pairs; ++pair) {
    for (int token = 0; token < block.num_tokens; ++token) {
      for (int idx = 0; idx < 2; ++idx, ++lanes) {
        float sum = 0.0f;
        for (int lane = 0; lane < kWidth; ++lane) sum += (*lanes)[lane];
        block.sums[token * kFp8CpuRows + 2 * pair + idx] = sum;
      }
    }
  }
}

}  // namespace
}  // namespace effllm
