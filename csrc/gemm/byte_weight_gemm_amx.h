// What the CPU's loop over weights of a byte each, for bf16 x, is given on processors with AMX: a
// block of rows of W times some tokens, in tiles. The loop is byte_weight_gemm_amx.cpp.
#pragma once

#include <cstdint>

#include "gemm/amx_panels.h"

namespace effllm {

inline constexpr int kByteAmxRows = 32;  // of W that are decoded and multiplied at a time
inline constexpr int kByteAmxMaxRows = 128, kByteAmxMaxTokens = 256;  // of one call
inline constexpr int kByteAmxGroupK = 128;

// Whether x stays in L2 while W passes; else rows of W should share what of it comes there.
constexpr bool byte_amx_x_is_near(int64_t num_tokens, int64_t k) {
  return num_tokens * k <= int64_t{1} << 19;
}

struct ByteAmxBlock {
  const uint8_t* weight;
  int64_t stride_weight;
  int num_rows;
  int64_t k;
  const uint8_t* next_weight;  // the rows that come next, to be prefetched; null: none

  const bfloat16* x;  // [tiles of 64 columns][panels] of AmxTokens
  int64_t stride_x_tile;
  int num_tokens;

  // By which the sums of 128 columns are multiplied; null: 1. 2^row_shift rows share them, and
  // first_row is where the block is among all.
  const float* group_scales;
  int64_t stride_scales_row, stride_scales_group;
  int row_shift;
  int64_t first_row;

  const float* scales;  // [rows]
  const float* biases;  // [rows]

  bfloat16* out;
  int64_t stride_out;  // from token to token

  // Memory for the sums of the block: rows, rounded up to kByteAmxRows, times tokens, rounded up to
  // whole panels.
  float* sums;
};

using ByteAmxKernel = void (*)(const ByteAmxBlock&);

// Defined on x86-64 alone.
void byte_weight_gather_amx(const AmxTokens& tokens, int64_t first_tile, int64_t last_tile);
void multiply_e4m3_weight_amx(const ByteAmxBlock& block);
void multiply_int8_weight_amx(const ByteAmxBlock& block);

}  // namespace effllm
