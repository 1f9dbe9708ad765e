// What the matmuls over weights of a byte each do on the CPU around their inner loop: x and scales
// of any type become floats where the loop wants them, and threads share the rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/math.h"
#include "gemm/byte_weight_gemm_amx.h"
#include "gemm/fp8_gemm.h"
#include "gemm/fp8_gemm_block.h"

namespace effllm {

static_assert(kFp8CpuTileK == kFp8GroupSize && kFp8GroupSize % kFp8CpuRows == 0);

// Of what weights are: the inner loop, what its sums are to be multiplied by, and the loop for bf16
// x with AMX.
struct E4M3Weights {
  static constexpr float kPower = kE4M3VectorPower;
  static constexpr Fp8BlockKernel kBaseline = multiply_block<4, E4M3Decoder>;
  static constexpr Fp8BlockKernel kAvx2 = fp8_block_avx2, kAvx512 = fp8_block_avx512;
  static constexpr ByteAmxKernel kAmx = multiply_e4m3_weight_amx;
};

struct Int8Weights {
  static constexpr float kPower = 1.0f;
  static constexpr Fp8BlockKernel kBaseline = multiply_block<4, Int8Decoder>;
  static constexpr Fp8BlockKernel kAvx2 = int8_weight_block_avx2;
  static constexpr Fp8BlockKernel kAvx512 = int8_weight_block_avx512;
  static constexpr ByteAmxKernel kAmx = multiply_int8_weight_amx;
};

template <class Weights>
Fp8BlockKernel select_fp8_block_kernel() {
  if constexpr (kHasX86Isas) {
    const CpuIsa isa = cpu_isa();
    if (isa >= CpuIsa::kAvx512) return Weights::kAvx512;
    if (isa == CpuIsa::kAvx2) return Weights::kAvx2;
  }
  return Weights::kBaseline;
}

// A token's columns of a tile, on a cache line.
struct alignas(64) Fp8TokenTile {
  float columns[kFp8CpuTileK];
};

// x as [num_tiles, M], padded with zeros to whole tiles.
template <class T, class Threads>
std::vector<Fp8TokenTile> gather_fp8_x(const Fp8GemmParams& params, int64_t num_tiles,
                                       const Threads& threads) {
  constexpr int64_t kTokens = 8;  // for fewer, threads cost more than they save
  std::vector<Fp8TokenTile> tiles(num_tiles * params.m);
  threads.for_each(params.m, kTokens, [&](int64_t m) {
    const T* row = static_cast<const T*>(params.x) + m * params.k;
    for (int64_t k = 0; k < params.k; ++k) {
      tiles[k / kFp8CpuTileK * params.m + m].columns[k % kFp8CpuTileK] = to_float(row[k]);
    }
  });
  return tiles;
}

// [num_tiles, rows] of grouped scales; empty for others. 2^row_shift rows share one.
inline std::vector<float> load_group_scales(const Fp8Scales& scales, int64_t num_tiles,
                                            int64_t rows) {
  std::vector<float> table;
  if (!scales.grouped) return table;
  table.resize(num_tiles * rows);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t row = 0; row < rows; ++row) {
      table[tile * rows + row] =
          load_float(scales.data, scales.dtype, scales.index(row << scales.row_shift, tile));
    }
  }
  return table;
}

// What a finished sum of a row is multiplied by: 1 where groups have been scaled.
inline float row_scale(const Fp8Scales& scales, int64_t row) {
  if (scales.data == nullptr || scales.grouped) return 1.0f;
  return load_float(scales.data, scales.dtype, scales.index(row, 0));
}

// For x of type T and out of type Out. `threads` as in packed_gemm_cpu.h.
template <class T, class Out, class Weights = E4M3Weights, class Threads>
void multiply_fp8(const Fp8GemmParams& params, const Threads& threads) {
  const Fp8BlockKernel kernel = select_fp8_block_kernel<Weights>();
  const int64_t num_tiles = ceil_div<int64_t>(params.k, kFp8CpuTileK);
  const std::vector<Fp8TokenTile> x = gather_fp8_x<T>(params, num_tiles, threads);
  const std::vector<float> x_scales = load_group_scales(params.x_scales, num_tiles, params.m);
  const int row_shift = params.w_scales.row_shift;
  const int64_t num_scale_rows = ceil_div(params.n, int64_t{1} << row_shift);
  // One row more, for the loop takes rows in pairs.
  std::vector<float> w_scales(params.w_scales.grouped ? (num_scale_rows + 1) * num_tiles : 0);
  if (params.w_scales.grouped) {
    // The loop goes along a row: tiles are innermost.
    const std::vector<float> by_tile =
        load_group_scales(params.w_scales, num_tiles, num_scale_rows);
    for (size_t idx = 0; idx < by_tile.size(); ++idx) {
      w_scales[idx % num_scale_rows * num_tiles + idx / num_scale_rows] = by_tile[idx];
    }
  }

  const auto multiply = [&](int64_t first_row, int64_t first_token) {
    float sums[kFp8CpuMaxTokens * kFp8CpuRows];
    const int64_t num_rows = std::min<int64_t>(params.n - first_row, kFp8CpuRows);
    const int64_t num_tokens = std::min<int64_t>(params.m - first_token, kFp8CpuMaxTokens);
    kernel({
        .weight = params.weight + first_row * params.stride_weight_n,
        .stride_weight = params.stride_weight_n,
        .num_rows = static_cast<int>(num_rows),
        .k = params.k,
        .x = reinterpret_cast<const float*>(x.data() + first_token),
        .stride_x_tile = params.m * kFp8CpuTileK,
        .num_tokens = static_cast<int>(num_tokens),
        .x_scales = x_scales.empty() ? nullptr : x_scales.data() + first_token,
        .stride_x_scales = params.m,
        .w_scales = params.w_scales.grouped ? w_scales.data() + (first_row >> row_shift) * num_tiles
                                            : nullptr,
        .stride_w_scales = row_shift == 0 ? num_tiles : 0,
        .sums = sums,
    });
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t n = first_row + row;
      const float w_scale = row_scale(params.w_scales, n) * Weights::kPower;
      const float bias = params.bias == nullptr
                             ? 0.0f
                             : load_float(params.bias, params.bias_dtype, n * params.stride_bias);
      for (int64_t token = 0; token < num_tokens; ++token) {
        const int64_t m = first_token + token;
        const float sum = sums[token * kFp8CpuRows + row];
        static_cast<Out*>(params.out)[m * params.n + n] =
            from_float<Out>(sum * w_scale * row_scale(params.x_scales, m) + bias);
      }
    }
  };

  // Threads pay off from some ten thousand products each.
  const int64_t grain =
      ceil_div<int64_t>(int64_t{1} << 15, kFp8CpuRows * (params.k + 1) *
                                              std::min<int64_t>(params.m + 1, kFp8CpuMaxTokens));
  threads.for_each(ceil_div<int64_t>(params.n, kFp8CpuRows), grain, [&](int64_t block) {
    for (int64_t token = 0; token < params.m; token += kFp8CpuMaxTokens) {
      multiply(block * kFp8CpuRows, token);
    }
  });
}

}  // namespace effllm
