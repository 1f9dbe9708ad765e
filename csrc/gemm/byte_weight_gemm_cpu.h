// What the matmuls over weights alone of a byte each do on the CPU: bf16 x on processors with AMX
// goes to the loop of byte_weight_gemm_amx.h, of which this is the code around, all else to that of
// fp8_gemm_cpu.h. The choice is by dtype and processor, never by shape, as each loop has its own
// order of additions: a token's result does not depend on the batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/cpu_isa.h"
#include "common/math.h"
#include "gemm/byte_weight_gemm_amx.h"
#include "gemm/fp8_gemm.h"
#include "gemm/fp8_gemm_cpu.h"

namespace effllm {

static_assert(kByteAmxGroupK == kFp8GroupSize && kByteAmxMaxRows % kByteAmxRows == 0);

// x in panels, those of each kByteAmxMaxTokens tokens after those of the ones before.
class ByteAmxX {
 public:
  template <class Threads>
  ByteAmxX(const Fp8GemmParams& params, const Threads& threads)
      : num_tiles_(ceil_div<int64_t>(params.k, kAmxPanelTileK)),
        lines_(std::max<int64_t>(1, num_tiles_ * padded(params.m))) {
    constexpr int64_t kTiles = 8;  // of a task
    for (int64_t token = 0; token < params.m; token += kByteAmxMaxTokens) {
      const int64_t num_tokens = std::min<int64_t>(params.m - token, kByteAmxMaxTokens);
      const AmxTokens tokens{
          .x = static_cast<const bfloat16*>(params.x) + token * params.k,
          .k = params.k,
          .num_tokens = static_cast<int>(num_tokens),
          .tiles = lines_.data()[token * num_tiles_].columns,
          .stride_tile = stride_tile(num_tokens),
      };
      const int64_t grain = ceil_div<int64_t>(64, num_tokens);
      threads.for_each(ceil_div(num_tiles_, kTiles), grain, [&](int64_t task) {
        byte_weight_gather_amx(tokens, task * kTiles, std::min(num_tiles_, (task + 1) * kTiles));
      });
    }
  }

  const bfloat16* from(int64_t token) const { return lines_.data()[token * num_tiles_].columns; }

  static int64_t stride_tile(int64_t num_tokens) { return padded(num_tokens) * kAmxPanelTileK; }

 private:
  struct alignas(64) Line {
    bfloat16 columns[kAmxPanelTileK];
  };

  static int64_t padded(int64_t num_tokens) {
    return amx_padded_tokens(num_tokens, kByteAmxMaxTokens);
  }

  int64_t num_tiles_;
  // [tiles, padded tokens] of each call; never empty, as it is pointed into.
  std::vector<Line> lines_;
};

// Scales of groups in fp32, where they are if they are that.
struct ByteAmxGroupScales {
  explicit ByteAmxGroupScales(const Fp8GemmParams& params) {
    const Fp8Scales& scales = params.w_scales;
    if (!scales.grouped) return;
    data = static_cast<const float*>(scales.data);
    stride_row = scales.stride_row, stride_group = scales.stride_group;
    if (scales.dtype == DType::kFloat32) return;
    stride_group = ceil_div(params.n, int64_t{1} << scales.row_shift), stride_row = 1;
    converted = load_group_scales(scales, ceil_div<int64_t>(params.k, kFp8GroupSize), stride_group);
    data = converted.data();
  }

  const float* data = nullptr;
  int64_t stride_row = 0, stride_group = 0;
  std::vector<float> converted;
};

// Blocks of so many rows, one after the other, times all tokens.
class ByteAmxWorker {
 public:
  ByteAmxWorker(const Fp8GemmParams& params, const ByteAmxX& x,
                const ByteAmxGroupScales& group_scales, int64_t rows_per_block)
      : params_(params),
        x_(x),
        group_scales_(group_scales),
        rows_per_block_(rows_per_block),
        sums_(rows_per_block *
              round_up<int64_t>(std::min<int64_t>(params.m, kByteAmxMaxTokens), kAmxPanelTokens)) {}

  void run(int64_t block, int64_t next_block, ByteAmxKernel kernel) {
    const int64_t first_row = block * rows_per_block_, next_row = next_block * rows_per_block_;
    const int64_t num_rows = std::min(params_.n - first_row, rows_per_block_);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t n = first_row + row;
      scales_[row] = row_scale(params_.w_scales, n);
      if (params_.bias == nullptr) continue;
      biases_[row] = load_float(params_.bias, params_.bias_dtype, n * params_.stride_bias);
    }
    for (int64_t token = 0; token < params_.m; token += kByteAmxMaxTokens) {
      const int64_t num_tokens = std::min<int64_t>(params_.m - token, kByteAmxMaxTokens);
      kernel({
          .weight = params_.weight + first_row * params_.stride_weight_n,
          .stride_weight = params_.stride_weight_n,
          .num_rows = static_cast<int>(num_rows),
          .k = params_.k,
          .next_weight =
              next_row < params_.n ? params_.weight + next_row * params_.stride_weight_n : nullptr,
          .x = x_.from(token),
          .stride_x_tile = x_.stride_tile(num_tokens),
          .num_tokens = static_cast<int>(num_tokens),
          .group_scales = group_scales_.data,
          .stride_scales_row = group_scales_.stride_row,
          .stride_scales_group = group_scales_.stride_group,
          .row_shift = params_.w_scales.row_shift,
          .first_row = first_row,
          .scales = scales_,
          .biases = biases_,
          .out = static_cast<bfloat16*>(params_.out) + token * params_.n + first_row,
          .stride_out = params_.n,
          .sums = sums_.data(),
      });
    }
  }

 private:
  const Fp8GemmParams& params_;
  const ByteAmxX& x_;
  const ByteAmxGroupScales& group_scales_;
  const int64_t rows_per_block_;
  std::vector<float> sums_;
  float scales_[kByteAmxMaxRows] = {}, biases_[kByteAmxMaxRows] = {};
};

template <class Threads>
void multiply_byte_weight_amx(const Fp8GemmParams& params, ByteAmxKernel kernel,
                              const Threads& threads) {
  if (params.m == 0 || params.n == 0) return;
  // Few rows are the most contiguous part of W. Each thread wants some blocks of more, too.
  const bool near = byte_amx_x_is_near(std::min<int64_t>(params.m, kByteAmxMaxTokens), params.k);
  const int64_t shared_rows = round_up<int64_t>(params.n / (4 * threads.count()), kByteAmxRows);
  const int64_t rows =
      near ? kByteAmxRows : std::clamp<int64_t>(shared_rows, kByteAmxRows, kByteAmxMaxRows);
  const int64_t num_blocks = ceil_div<int64_t>(params.n, rows);
  // Threads pay off from some hundred thousand products each.
  const int64_t products = params.n * (params.k + 1) * std::min<int64_t>(params.m, 8);
  const int64_t num_workers =
      std::min({threads.count(), num_blocks, ceil_div<int64_t>(products, int64_t{1} << 17)});

  // All memory is there before the threads start: an exception in one of them would end the
  // process.
  const ByteAmxX x(params, threads);
  const ByteAmxGroupScales group_scales(params);
  std::vector<ByteAmxWorker> workers;
  workers.reserve(num_workers);
  for (int64_t idx = 0; idx < num_workers; ++idx) {
    workers.emplace_back(params, x, group_scales, rows);
  }
  std::atomic<int64_t> next_block = 0;
  threads.for_each(num_workers, 1, [&](int64_t idx) {
    for (int64_t block = next_block.fetch_add(1); block < num_blocks;) {
      const int64_t next = next_block.fetch_add(1);
      workers[idx].run(block, next, kernel);
      block = next;
    }
  });
}

// For x and out of type T. `threads` as in packed_gemm_cpu.h.
template <class T, class Weights, class Threads>
void multiply_byte_weight(const Fp8GemmParams& params, const Threads& threads) {
  if constexpr (kHasX86Isas && std::is_same_v<T, bfloat16>) {
    if (cpu_isa() >= CpuIsa::kAmx) return multiply_byte_weight_amx(params, Weights::kAmx, threads);
  }
  multiply_fp8<T, T, Weights>(params, threads);
}

}  // namespace effllm
