// The CPU's inner loop over int8 weights: up to 16 rows of W times some tokens, exact in int32.
//
// One source for every instruction set, which brings a type that says how many bytes of a row and a
// token it takes at a time, and how. Compiled as packed_gemm_strip.h is: internal linkage, and no
// inline function that has not.
//   kBytes, kRows, kTokens   of a step along K; whose sums stay in registers
//   Weights, X, Sums         kBytes of a row, of a token, and what lanes have added up of products
//   weights(bytes), x(bytes), add(sums, weights, x), total(sums)
//   kWeightOffset            what weights() adds to each weight
#pragma once

#include <cstdint>

namespace effllm {

inline constexpr int kInt8CpuRows = 16;
inline constexpr int kInt8CpuMaxTokens = 48;  // of one call: their sums stay in L1
inline constexpr int kInt8CpuTileK = 64;      // to a multiple of which tokens are padded

struct Int8Block {
  const int8_t* weight;
  int64_t stride_weight;
  int num_rows;
  int64_t k;

  const int8_t* x;  // [tokens, stride], zero past K
  int64_t stride_x;
  const int32_t* x_sums;  // of each token
  int num_tokens;

  int32_t* sums;  // [num_tokens, 16 rows], out
};

using Int8BlockKernel = void (*)(const Int8Block&);

// Defined in int8_gemm_<isa>.cpp, on x86-64 alone.
void int8_block_avx2(const Int8Block& block);
void int8_block_avx512vnni(const Int8Block& block);

namespace {

// Any processor; compilers find the vectors.
struct Int8PlainDot {
  static constexpr int kBytes = 16, kRows = 2, kTokens = 2, kWeightOffset = 0;
  using Weights = const int8_t*;
  using X = const int8_t*;
  using Sums = int32_t;

  static Weights weights(const int8_t* bytes) { return bytes; }
  static X x(const int8_t* bytes) { return bytes; }
  static Sums add(Sums sums, Weights weights, X x) {
    for (int i = 0; i < kBytes; ++i) sums += weights[i] * x[i];
    return sums;
  }
  static int32_t total(Sums sums) { return sums; }
};

// sums += the products of `steps` steps from the columns that `rows` and `x` point at.
template <class Isa, int kTokens>
inline void add_int8_steps(const int8_t* const (&rows)[Isa::kRows], const int8_t* x,
                           int64_t stride_x, int64_t steps,
                           typename Isa::Sums (&out)[Isa::kRows][kTokens]) {
  typename Isa::Sums sums[Isa::kRows][kTokens];
  __builtin_memcpy(sums, out, sizeof(sums));
  for (int64_t column = 0; column < steps * Isa::kBytes; column += Isa::kBytes) {
    typename Isa::X values[kTokens];
    for (int token = 0; token < kTokens; ++token) {
      values[token] = Isa::x(x + token * stride_x + column);
    }
    for (int row = 0; row < Isa::kRows; ++row) {
      const typename Isa::Weights weights = Isa::weights(rows[row] + column);
      for (int token = 0; token < kTokens; ++token) {
        sums[row][token] = Isa::add(sums[row][token], weights, values[token]);
      }
    }
  }
  __builtin_memcpy(out, sums, sizeof(sums));
}

template <class Isa, int kTokens>
inline void multiply_int8_tile(const Int8Block& block, int first_row, int first_token) {
  const int8_t* rows[Isa::kRows];
  for (int row = 0; row < Isa::kRows; ++row) {
    // The first row stands in for those past the last, which nobody reads.
    const int existing = first_row + row < block.num_rows ? first_row + row : first_row;
    rows[row] = block.weight + existing * block.stride_weight;
  }
  const int8_t* const x = block.x + first_token * block.stride_x;
  typename Isa::Sums sums[Isa::kRows][kTokens] = {};
  const int64_t steps = block.k / Isa::kBytes, rest = block.k % Isa::kBytes;
  add_int8_steps<Isa, kTokens>(rows, x, block.stride_x, steps, sums);
  if (rest > 0) {
    // Where x is zero any weights will do, but not those of memory that is not there.
    int8_t ends[Isa::kRows][Isa::kBytes] = {};
    for (int row = 0; row < Isa::kRows; ++row) {
      __builtin_memcpy(ends[row], rows[row] + steps * Isa::kBytes, rest);
      rows[row] = ends[row];
    }
    add_int8_steps<Isa, kTokens>(rows, x + steps * Isa::kBytes, block.stride_x, 1, sums);
  }
  for (int row = 0; row < Isa::kRows; ++row) {
    for (int token = 0; token < kTokens; ++token) {
      // Sums of weights with an offset may wrap, and wrap back.
      const auto offset = static_cast<uint32_t>(Isa::kWeightOffset) *
                          static_cast<uint32_t>(block.x_sums[first_token + token]);
      const auto total = static_cast<uint32_t>(Isa::total(sums[row][token])) - offset;
      block.sums[(first_token + token) * kInt8CpuRows + first_row + row] =
          static_cast<int32_t>(total);
    }
  }
}

template <class Isa>
void multiply_int8_block(const Int8Block& block) {
  static_assert(kInt8CpuRows % Isa::kRows == 0 && kInt8CpuTileK % Isa::kBytes == 0);
  static_assert(Isa::kTokens == 2 || Isa::kTokens == 3);
  for (int row = 0; row < block.num_rows; row += Isa::kRows) {
    int token = 0;
    for (; token + Isa::kTokens <= block.num_tokens; token += Isa::kTokens) {
      multiply_int8_tile<Isa, Isa::kTokens>(block, row, token);
    }
    if (token + 2 == block.num_tokens) {
      multiply_int8_tile<Isa, 2>(block, row, token);
    } else if (token + 1 == block.num_tokens) {
      multiply_int8_tile<Isa, 1>(block, row, token);
    }
  }
}

}  // namespace
}  // namespace effllm
