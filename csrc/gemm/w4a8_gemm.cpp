// w4a8_gemm: schema and CPU implementation.
#include "gemm/w4a8_gemm.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"
#include "gemm/int8_gemm_cpu.h"
#include "gemm/w4a8_gemm_cpu.h"

namespace effllm {
namespace {

void check_zero_values(const W4A8GemmParams& params) {
  if (params.zeros == nullptr) return;
  for (int64_t n = 0; n < params.n; ++n) {
    for (int64_t group = 0; group < params.num_groups; ++group) {
      const int zero = params.zeros[n * params.stride_zeros_n + group * params.stride_zeros_g];
      if (zero > kW4A8MaxZero) {
        fail("w4a8_gemm", "zeros must be at most " + std::to_string(kW4A8MaxZero) + ", got " +
                              std::to_string(zero) + " at [" + std::to_string(n) + ", " +
                              std::to_string(group) + "]");
      }
    }
  }
}

void check_multiplier_values(const W4A8GemmParams& params) {
  const W4A8Multipliers& multipliers = params.multipliers;
  if (multipliers.data == nullptr) return;
  for (int64_t n = 0; n < params.n; ++n) {
    const uint8_t* row = multipliers.data + n * multipliers.stride_n;
    int bits = 0;  // of any in the row: the search for a larger one is the exception
    for (int64_t group = 0; group < multipliers.num_groups; ++group) {
      bits |= row[group * multipliers.stride_g];
    }
    for (int64_t group = 0; bits > kW4A8MaxMultiplier; ++group) {
      const int multiplier = row[group * multipliers.stride_g];
      if (multiplier <= kW4A8MaxMultiplier) continue;
      fail("w4a8_gemm", "multipliers must be at most " + std::to_string(kW4A8MaxMultiplier) +
                            ", got " + std::to_string(multiplier) + " at [" + std::to_string(n) +
                            ", " + std::to_string(group) + "]");
    }
  }
}

// Sums of a block of 16 rows and up to kInt8CpuMaxTokens tokens, [tokens, 16], and what becomes of
// them.
class W4A8Block {
 public:
  static constexpr int64_t kSums = kInt8CpuMaxTokens * kInt8CpuRows;

  W4A8Block(const W4A8GemmParams& params, const W4A8Lines& cut, const W4A8Tokens& x,
            const int8_t* weight)
      : params_(params), cut_(cut), x_(x), weight_(weight) {}

  template <class Out>
  void run(int64_t first_row, int64_t first_token) {
    const int64_t num_rows = std::min<int64_t>(params_.n - first_row, kInt8CpuRows);
    const int64_t num_tokens = std::min<int64_t>(params_.m - first_token, kInt8CpuMaxTokens);
    std::fill_n(totals_, kSums, 0.0f);
    for (int64_t group = 0; group < params_.num_groups; ++group) {
      multiply(group, num_rows, first_token, num_tokens);
      for (int64_t row = 0; row < num_rows; ++row) {
        const float scale = load_float(
            params_.scales, params_.scales_dtype,
            (first_row + row) * params_.stride_scales_n + group * params_.stride_scales_g);
        for (int64_t token = 0; token < num_tokens; ++token) {
          const int64_t idx = token * kInt8CpuRows + row;
          const auto sum = static_cast<float>(sums_[idx]);
          // As int8_gemm has it with one group: its scales are multiplied first.
          totals_[idx] = params_.num_groups == 1 ? sum * (scale * x_scale(first_token + token))
                                                 : totals_[idx] + sum * scale;
        }
      }
    }
    for (int64_t token = 0; token < num_tokens; ++token) {
      const int64_t m = first_token + token;
      Out* out = static_cast<Out*>(params_.out) + m * params_.n + first_row;
      for (int64_t row = 0; row < num_rows; ++row) {
        float total = totals_[token * kInt8CpuRows + row];
        if (params_.num_groups != 1) total *= x_scale(m);
        out[row] = from_float<Out>(total + bias(first_row + row));
      }
    }
  }

 private:
  void multiply(int64_t group, int64_t num_rows, int64_t first_token, int64_t num_tokens) {
    const int64_t first_line = cut_.first_of(group), stride = cut_.count * kW4A8Line;
    kernel_({
        .weight = weight_ + first_line * kW4A8Line,
        .stride_weight = stride,
        .num_rows = static_cast<int>(num_rows),
        .k = cut_.count_of(group) * kW4A8Line,
        .x = x_.lines[first_token * cut_.count + first_line].bytes,
        .stride_x = stride,
        .x_sums = x_.sums.data() + group * params_.m + first_token,
        .num_tokens = static_cast<int>(num_tokens),
        .sums = sums_,
    });
  }

  float x_scale(int64_t m) const { return load_int8_scale(params_.x_scales, m); }
  float bias(int64_t n) const {
    if (params_.bias == nullptr) return 0.0f;
    return load_float(params_.bias, params_.bias_dtype, n * params_.stride_bias);
  }

  const W4A8GemmParams& params_;
  const W4A8Lines& cut_;
  const W4A8Tokens& x_;
  const int8_t* weight_;
  const Int8BlockKernel kernel_ = select_int8_block_kernel();
  int32_t sums_[kSums];
  float totals_[kSums];
};

template <class Out>
void multiply_w4a8(const W4A8GemmParams& params) {
  const TorchThreads threads;
  const W4A8Lines cut(params);
  const W4A8Tokens x(params, cut, threads);
  // All memory is there before the threads start: an exception in one of them would end the
  // process.
  const int64_t num_blocks = ceil_div<int64_t>(params.n, kInt8CpuRows);
  // Threads pay off from some hundred thousand products each.
  const int64_t products = params.n * (params.k + 1) * std::min<int64_t>(params.m, 8);
  const int64_t num_workers =
      std::min({threads.count(), num_blocks, ceil_div<int64_t>(products, int64_t{1} << 17)});
  const int64_t block_bytes = kInt8CpuRows * cut.count * kW4A8Line;
  const std::unique_ptr<int8_t[]> memory(new int8_t[num_workers * block_bytes]);
  std::atomic<int64_t> next_block = 0;
  threads.for_each(num_workers, 1, [&](int64_t idx) {
    int8_t* const weight = memory.get() + idx * block_bytes;
    W4A8Block sums(params, cut, x, weight);
    for (int64_t block; (block = next_block.fetch_add(1)) < num_blocks;) {
      unpack_w4a8_block(params, cut, block, weight);
      for (int64_t token = 0; token < params.m; token += kInt8CpuMaxTokens) {
        sums.run<Out>(block * kInt8CpuRows, token);
      }
    }
  });
}

Tensor w4a8_gemm_cpu(const Tensor& x, const Tensor& x_scales, const Tensor& qweight,
                     const Tensor& scales, const std::optional<Tensor>& zeros,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& multipliers,
                     int64_t group_size, torch::headeronly::ScalarType out_dtype) {
  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor x_scale_rows = flatten_rows(x_scales);
  W4A8GemmParams params = check_w4a8_gemm(
      as_view(x_rows, "x"), {as_view(x_scales, "x_scales"), as_view(x_scale_rows, "x_scales")},
      as_view(qweight, "qweight"), as_view(scales, "scales"), as_view(zeros, "zeros"),
      as_view(bias, "bias"), as_view(multipliers, "multipliers"), group_size, as_dtype(out_dtype));
  check_zero_values(params);
  check_multiplier_values(params);
  Tensor out = new_empty_like_rows(x, params.n, params.out_dtype);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  dispatch_float(params.out_dtype, [&](auto element) { multiply_w4a8<decltype(element)>(params); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "w4a8_gemm(Tensor x, Tensor x_scales, Tensor qweight, Tensor scales, Tensor? zeros=None, "
      "Tensor? bias=None, Tensor? multipliers=None, *, int group_size, ScalarType out_dtype) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("w4a8_gemm", TORCH_BOX(&w4a8_gemm_cpu)); }

}  // namespace effllm
