// w4a8_gemm: schema and CPU implementation.
#include "gemm/w4a8_gemm.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"
#include "gemm/int8_gemm_cpu.h"
#include "gemm/w4a8_gemm_cpu.h"

namespace effllm {
namespace {

void check_group_values(const W4A8GemmParams& params) {
  const W4A8GroupBytes bytes(params);
  if (bytes.data == nullptr) return;
  const int largest = bytes.are_multipliers ? kW4A8MaxMultiplier : kW4A8MaxZero;
  for (int64_t n = 0; n < params.n; ++n) {
    const uint8_t* row = bytes.row(n);
    const auto largest_of_row = [&](int64_t stride) {
      uint8_t value = 0;
      for (int64_t group = 0; group < bytes.num_groups; ++group) {
        value = std::max(value, row[group * stride]);
      }
      return value;
    };
    // Of a row without gaps compilers find it in vectors.
    if ((bytes.stride_g == 1 ? largest_of_row(1) : largest_of_row(bytes.stride_g)) <= largest) {
      continue;
    }
    int64_t group = 0;
    while (row[group * bytes.stride_g] <= largest) ++group;
    fail("w4a8_gemm", (bytes.are_multipliers ? "multipliers" : "zeros") +
                          (" must be at most " + std::to_string(largest)) + ", got " +
                          std::to_string(row[group * bytes.stride_g]) + " at [" +
                          std::to_string(n) + ", " + std::to_string(group) + "]");
  }
}

// What becomes of the sums of 16 rows: of integers with one group, else of floats to which scales
// of groups have been applied.
class W4A8Finish {
 public:
  W4A8Finish(const W4A8GemmParams& params, int64_t first_row)
      : params_(params),
        first_row_(first_row),
        num_rows_(std::min<int64_t>(params.n - first_row, kInt8CpuRows)) {
    for (int64_t row = 0; row < num_rows_; ++row) {
      scales_[row] = params.num_groups == 1 ? scale(row, 0) : 1.0f;
      if (params.bias == nullptr) continue;
      biases_[row] =
          load_float(params.bias, params.bias_dtype, (first_row + row) * params.stride_bias);
    }
  }

  int64_t num_rows() const { return num_rows_; }

  float scale(int64_t row, int64_t group) const {
    return load_float(
        params_.scales, params_.scales_dtype,
        (first_row_ + row) * params_.stride_scales_n + group * params_.stride_scales_g);
  }

  // Sums of tokens from first_token on, at [token * token_stride + row * row_stride].
  template <class Out, class Sum>
  void store(int64_t first_token, int64_t num_tokens, const Sum* sums, int64_t token_stride,
             int64_t row_stride) const {
    for (int64_t m = first_token; m < first_token + num_tokens; ++m, sums += token_stride) {
      const float x_scale = load_int8_scale(params_.x_scales, m);
      Out* out = static_cast<Out*>(params_.out) + m * params_.n + first_row_;
      for (int64_t row = 0; row < num_rows_; ++row) {
        // As int8_gemm has it with one group: its scales are multiplied first.
        const float scaled = static_cast<float>(sums[row * row_stride]) * (scales_[row] * x_scale);
        out[row] = from_float<Out>(scaled + biases_[row]);
      }
    }
  }

 private:
  const W4A8GemmParams& params_;
  const int64_t first_row_, num_rows_;
  float scales_[kInt8CpuRows], biases_[kInt8CpuRows] = {};
};

// What sums of codes of 16 rows and a group are multiplied by; anything for rows past N.
struct W4A8CodeGroup {
  uint32_t bytes[kW4A8CodeSumRows] = {};
  float scales[kW4A8CodeSumRows] = {};
};

// Blocks of 16 rows, one after the other, times all tokens.
class W4A8Blocks {
 public:
  // `weight` has room for the int8 of a block, unless codes are summed up as they are.
  W4A8Blocks(const W4A8GemmParams& params, const W4A8Lines& cut, const W4A8Tokens& x,
             int8_t* weight)
      : params_(params),
        cut_(cut),
        x_(x),
        weight_(weight),
        scales_(x.panels ? kInt8AmxRows * params.num_groups : 0),
        code_groups_(cut.per_code_sum > 0 ? cut.num_sums() : 0),
        code_sums_(code_groups_.size() * kW4A8CodeSumRows) {}

  template <class Out>
  void run(int64_t block) {
    const W4A8Finish finish(params_, block * kInt8CpuRows);
    if constexpr (kHasX86Isas) {
      if (cut_.per_code_sum > 0) return sum_codes<Out>(finish, block);
    }
    unpack_w4a8_block(params_, cut_, unpack_, block, weight_);
    if constexpr (kHasX86Isas) {
      if (x_.panels) return multiply_panels<Out>(finish);
    }
    for (int64_t token = 0; token < params_.m; token += kInt8CpuMaxTokens) {
      multiply_vectors<Out>(finish, token);
    }
  }

 private:
  static constexpr int64_t kPanelTokens = kInt8AmxPanels * kInt8AmxTokens;

  template <class Out>
  void sum_codes(const W4A8Finish& finish, int64_t block) {
    const int64_t num_groups = cut_.num_sums();
    for (int64_t row = 0; row < finish.num_rows(); ++row) {
      for (int64_t group = 0; group < num_groups; ++group) {
        W4A8CodeGroup& of_group = code_groups_[static_cast<size_t>(group)];
        of_group.bytes[row] = group_bytes_.at(block * kInt8CpuRows + row, group);
        if (params_.num_groups > 1) of_group.scales[row] = finish.scale(row, group);
      }
    }
    for (int64_t token = 0; token < params_.m; ++token) {
      sum_w4a8_codes_avx512vnni({
          .words = w4a8_block_words(params_, block),
          .num_lines = cut_.count,
          .lines_per_sum = cut_.per_code_sum,
          .two_lines_per_tile = cut_.columns < kW4A8Line,
          .x = x_.lines[token * cut_.count].bytes,
          .sums = code_sums_.data(),
      });
      std::fill_n(sums_, kInt8CpuRows, 0);
      std::fill_n(totals_, kInt8CpuRows, 0.0f);
      for (int64_t group = 0; group < num_groups; ++group) {
        add_code_sums(code_groups_[static_cast<size_t>(group)],
                      code_sums_.data() + group * kW4A8CodeSumRows,
                      x_.sums[group * params_.m + token]);
      }
      if (params_.num_groups == 1) {
        finish.store<Out>(token, 1, sums_, kInt8CpuRows, 1);
      } else {
        finish.store<Out>(token, 1, totals_, kInt8CpuRows, 1);
      }
    }
  }

  // Unsigned, as products of codes alone may wrap, and wrap back.
  void add_code_sums(const W4A8CodeGroup& group, const int32_t* codes, uint32_t x_sum) {
    for (int row = 0; row < kW4A8CodeSumRows; ++row) {
      const auto sum = static_cast<uint32_t>(codes[row]);
      if (group_bytes_.are_multipliers) {
        const uint32_t product = group.bytes[row] * (sum - kInt4PaddingCode * x_sum);
        sums_[row] = static_cast<int32_t>(static_cast<uint32_t>(sums_[row]) + product);
      } else {
        const auto shifted = static_cast<int32_t>(sum - group.bytes[row] * x_sum);
        sums_[row] = shifted;  // if there is but one group
        totals_[row] += static_cast<float>(shifted) * group.scales[row];
      }
    }
  }

  template <class Out>
  void multiply_panels(const W4A8Finish& finish) {
    const bool is_grouped = params_.num_groups != 1;
    for (int64_t group = 0; is_grouped && group < params_.num_groups; ++group) {
      for (int64_t row = 0; row < finish.num_rows(); ++row) {
        scales_[group * kInt8AmxRows + row] = finish.scale(row, group);
      }
    }
    for (int64_t panel = 0; panel < x_.panels->count; panel += kInt8AmxPanels) {
      const int64_t token = panel * kInt8AmxTokens;
      const int64_t num_tokens = std::min(params_.m - token, kPanelTokens);
      const Int8AmxBlock block{
          .weight = weight_,
          .stride_weight = cut_.count * kW4A8Line,
          .num_rows = static_cast<int>(finish.num_rows()),
          .k = cut_.count * kW4A8Line,
          .x = x_.panels->panel(panel),
          .num_panels =
              static_cast<int>(std::min<int64_t>(x_.panels->count - panel, kInt8AmxPanels)),
      };
      if (is_grouped) {
        multiply_int8_groups_amx(block, cut_.per_group * kW4A8Line, scales_.data(), totals_);
        finish.store<Out>(token, num_tokens, totals_, 1, kPanelTokens);
      } else {
        multiply_int8_amx(block, sums_);
        finish.store<Out>(token, num_tokens, sums_, kInt8AmxRows, 1);
      }
    }
  }

  template <class Out>
  void multiply_vectors(const W4A8Finish& finish, int64_t first_token) {
    const int64_t num_tokens = std::min<int64_t>(params_.m - first_token, kInt8CpuMaxTokens);
    if (params_.num_groups == 1) {
      multiply_group(0, finish.num_rows(), first_token, num_tokens);
      finish.store<Out>(first_token, num_tokens, sums_, kInt8CpuRows, 1);
      return;
    }
    std::fill_n(totals_, num_tokens * kInt8CpuRows, 0.0f);
    for (int64_t group = 0; group < params_.num_groups; ++group) {
      multiply_group(group, finish.num_rows(), first_token, num_tokens);
      float scales[kInt8CpuRows];
      for (int64_t row = 0; row < finish.num_rows(); ++row) {
        scales[row] = finish.scale(row, group);
      }
      for (int64_t token = 0; token < num_tokens; ++token) {
        const int32_t* const sums = sums_ + token * kInt8CpuRows;
        float* const totals = totals_ + token * kInt8CpuRows;
        for (int64_t row = 0; row < finish.num_rows(); ++row) {
          totals[row] += static_cast<float>(sums[row]) * scales[row];
        }
      }
    }
    finish.store<Out>(first_token, num_tokens, totals_, kInt8CpuRows, 1);
  }

  void multiply_group(int64_t group, int64_t num_rows, int64_t first_token, int64_t num_tokens) {
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

  const W4A8GemmParams& params_;
  const W4A8Lines& cut_;
  const W4A8GroupBytes group_bytes_{params_};
  const W4A8Tokens& x_;
  int8_t* const weight_;
  const Int8BlockKernel kernel_ = select_int8_block_kernel();
  const W4A8CodeRowsKernel unpack_ = select_w4a8_code_rows_kernel();
  std::vector<float> scales_;  // [groups, kInt8AmxRows]
  std::vector<W4A8CodeGroup> code_groups_;
  std::vector<int32_t> code_sums_;  // [groups, rows]
  int32_t sums_[kPanelTokens * kInt8AmxRows];
  float totals_[kPanelTokens * kInt8CpuRows];
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
  const int64_t block_bytes = cut.per_code_sum > 0 ? 0 : kInt8CpuRows * cut.count * kW4A8Line;
  const std::unique_ptr<int8_t[]> memory(new int8_t[num_workers * block_bytes]);
  std::vector<W4A8Blocks> workers;
  workers.reserve(static_cast<size_t>(num_workers));
  for (int64_t idx = 0; idx < num_workers; ++idx) {
    workers.emplace_back(params, cut, x, memory.get() + idx * block_bytes);
  }
  std::atomic<int64_t> next_block = 0;
  threads.for_each(num_workers, 1, [&](int64_t idx) {
    for (int64_t block; (block = next_block.fetch_add(1)) < num_blocks;) {
      workers[static_cast<size_t>(idx)].run<Out>(block);
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
  check_group_values(params);
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
