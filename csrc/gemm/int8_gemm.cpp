// int8_gemm: schema and CPU implementation.
#include "gemm/int8_gemm.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"
#include "gemm/int8_gemm_cpu.h"
#include "gemm/int8_panels.h"

namespace effllm {
namespace {

// Tokens on cache lines, zeros after their K, and their sums.
struct Int8Tokens {
  struct alignas(64) Line {
    int8_t bytes[kInt8CpuTileK];
  };

  explicit Int8Tokens(const Int8GemmParams& params)
      : lines_per_token(ceil_div<int64_t>(params.k, kInt8CpuTileK)),
        lines(lines_per_token * params.m),
        sums(params.m) {
    constexpr int64_t kGrain = 8;  // for fewer, threads cost more than they save
    TorchThreads().for_each(params.m, kGrain, [&](int64_t m) {
      const auto* row = static_cast<const int8_t*>(params.x) + m * params.k;
      int32_t sum = 0;
      for (int64_t k = 0; k < params.k; ++k) sum += row[k];
      std::copy_n(row, params.k, lines.data()[m * lines_per_token].bytes);
      sums[m] = sum;
    });
  }

  int64_t lines_per_token;
  std::vector<Line> lines;
  std::vector<int32_t> sums;
};

// What int8_gemm.h makes of the exact sums [tokens, rows] of a block of W's rows.
template <int kMaxRows, class Out>
class Int8Finish {
 public:
  Int8Finish(const Int8GemmParams& params, int64_t first_row)
      : params_(params),
        first_row_(first_row),
        num_rows_(std::min<int64_t>(params.n - first_row, kMaxRows)) {
    for (int64_t row = 0; row < num_rows_; ++row) {
      const int64_t n = first_row + row;
      scales_[row] = load_int8_scale(params.w_scales, n);
      if (params.bias != nullptr) {
        biases_[row] = load_float(params.bias, params.bias_dtype, n * params.stride_bias);
      }
      if (params.x_zeros.data != nullptr) {
        w_sums_[row] = static_cast<uint32_t>(
            static_cast<const int32_t*>(params.w_sums.data)[n * params.w_sums.stride]);
      }
    }
  }

  void operator()(int64_t first_token, int64_t num_tokens, const int32_t* sums) const {
    for (int64_t m = first_token; m < first_token + num_tokens; ++m, sums += kMaxRows) {
      const float x_scale = load_int8_scale(params_.x_scales, m);
      const auto zero = params_.x_zeros.data == nullptr
                            ? 0u
                            : static_cast<uint32_t>(static_cast<const int8_t*>(
                                  params_.x_zeros.data)[m * params_.x_zeros.stride]);
      Out* const out = static_cast<Out*>(params_.out) + m * params_.n + first_row_;
      for (int64_t row = 0; row < num_rows_; ++row) {
        // Without overflow, if w_sums are what they should be.
        const auto sum =
            static_cast<int32_t>(static_cast<uint32_t>(sums[row]) - zero * w_sums_[row]);
        const float scaled = static_cast<float>(sum) * (scales_[row] * x_scale);
        out[row] = from_float<Out>(scaled + biases_[row]);
      }
    }
  }

 private:
  const Int8GemmParams& params_;
  const int64_t first_row_, num_rows_;
  float scales_[kMaxRows], biases_[kMaxRows] = {};
  uint32_t w_sums_[kMaxRows] = {};
};

// multiply(first row) for each block of so many rows of W. Threads pay off from some hundred
// thousand products each.
template <class F>
void for_each_block(const Int8GemmParams& params, int rows, const F& multiply) {
  const int64_t block_products =
      rows * (params.k + 1) * std::min<int64_t>(params.m + 1, kInt8CpuMaxTokens);
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 17, block_products);
  TorchThreads().for_each(ceil_div<int64_t>(params.n, rows), grain,
                          [&](int64_t block) { multiply(block * rows); });
}

template <class Out>
void multiply_int8_vectors(const Int8GemmParams& params) {
  const Int8BlockKernel kernel = select_int8_block_kernel();
  const Int8Tokens x(params);
  for_each_block(params, kInt8CpuRows, [&](int64_t first_row) {
    const Int8Finish<kInt8CpuRows, Out> finish(params, first_row);
    int32_t sums[kInt8CpuMaxTokens * kInt8CpuRows];
    for (int64_t token = 0; token < params.m; token += kInt8CpuMaxTokens) {
      const int64_t num_tokens = std::min<int64_t>(params.m - token, kInt8CpuMaxTokens);
      kernel({
          .weight = params.weight + first_row * params.stride_weight_n,
          .stride_weight = params.stride_weight_n,
          .num_rows = static_cast<int>(std::min<int64_t>(params.n - first_row, kInt8CpuRows)),
          .k = params.k,
          .x = reinterpret_cast<const int8_t*>(x.lines.data() + token * x.lines_per_token),
          .stride_x = x.lines_per_token * kInt8CpuTileK,
          .x_sums = x.sums.data() + token,
          .num_tokens = static_cast<int>(num_tokens),
          .sums = sums,
      });
      finish(token, num_tokens, sums);
    }
  });
}

template <class Out>
void multiply_int8_panels(const Int8GemmParams& params) {
  const Int8Panels x(static_cast<const int8_t*>(params.x), params.m, params.k, TorchThreads());
  for_each_block(params, kInt8AmxRows, [&](int64_t first_row) {
    const Int8Finish<kInt8AmxRows, Out> finish(params, first_row);
    int32_t sums[kInt8AmxPanels * kInt8AmxTokens * kInt8AmxRows];
    for (int64_t panel = 0; panel < x.count; panel += kInt8AmxPanels) {
      const int64_t token = panel * kInt8AmxTokens;
      const Int8AmxBlock block{
          .weight = params.weight + first_row * params.stride_weight_n,
          .stride_weight = params.stride_weight_n,
          .num_rows = static_cast<int>(std::min<int64_t>(params.n - first_row, kInt8AmxRows)),
          .k = params.k,
          .x = x.panel(panel),
          .num_panels = static_cast<int>(std::min<int64_t>(x.count - panel, kInt8AmxPanels)),
      };
      multiply_int8_amx(block, sums);
      finish(token, std::min<int64_t>(params.m - token, kInt8AmxPanels * kInt8AmxTokens), sums);
    }
  });
}

template <class Out>
void multiply_int8(const Int8GemmParams& params) {
  if constexpr (kHasX86Isas) {
    if (takes_int8_panels(params.m)) return multiply_int8_panels<Out>(params);
  }
  multiply_int8_vectors<Out>(params);
}

Tensor int8_gemm_cpu(const Tensor& x, const Tensor& x_scales, const Tensor& weight,
                     const Tensor& w_scales, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& x_zeros, const std::optional<Tensor>& w_sums,
                     torch::headeronly::ScalarType out_dtype) {
  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor x_scale_rows = flatten_rows(x_scales);
  const Tensor x_zero_rows = flatten_rows(x_zeros.value_or(x_scales));
  std::optional<Int8XValues> zeros;
  if (x_zeros) zeros = {as_view(*x_zeros, "x_zeros"), as_view(x_zero_rows, "x_zeros")};
  Int8GemmParams params = check_int8_gemm(
      as_view(x_rows, "x"), {as_view(x_scales, "x_scales"), as_view(x_scale_rows, "x_scales")},
      as_view(weight, "weight"), as_view(w_scales, "w_scales"), as_view(bias, "bias"), zeros,
      as_view(w_sums, "w_sums"), as_dtype(out_dtype));
  std::optional<Tensor> found_sums;
  if (x_zeros && !w_sums) {
    found_sums = sum_of_rows(weight, DType::kInt32);
    params.w_sums = {found_sums->const_data_ptr(), DType::kInt32, 1};
  }
  Tensor out = new_empty_like_rows(x, params.n, params.out_dtype);
  params.out = out.mutable_data_ptr();
  dispatch_float(params.out_dtype, [&](auto element) { multiply_int8<decltype(element)>(params); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "int8_gemm(Tensor x, Tensor x_scales, Tensor weight, Tensor w_scales, Tensor? bias=None, "
      "Tensor? x_zeros=None, Tensor? w_sums=None, *, ScalarType out_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("int8_gemm", TORCH_BOX(&int8_gemm_cpu)); }

}  // namespace effllm
