// int8_gemm: schema and CPU implementation.
#include "gemm/int8_gemm.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"
#include "gemm/int8_gemm_cpu.h"

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

// What int8_gemm.h makes of an exact sum.
class Int8Finish {
 public:
  explicit Int8Finish(const Int8GemmParams& params) : params_(params) {}

  float operator()(int64_t m, int64_t n, int32_t sum) const {
    if (params_.x_zeros.data != nullptr) {
      // Without overflow, if w_sums are what they should be.
      const auto zero = static_cast<uint32_t>(
          static_cast<const int8_t*>(params_.x_zeros.data)[m * params_.x_zeros.stride]);
      const auto w_sum = static_cast<uint32_t>(
          static_cast<const int32_t*>(params_.w_sums.data)[n * params_.w_sums.stride]);
      sum = static_cast<int32_t>(static_cast<uint32_t>(sum) - zero * w_sum);
    }
    const float scale = load_int8_scale(params_.w_scales, n) * load_int8_scale(params_.x_scales, m);
    const float bias = params_.bias == nullptr
                           ? 0.0f
                           : load_float(params_.bias, params_.bias_dtype, n * params_.stride_bias);
    return static_cast<float>(sum) * scale + bias;
  }

 private:
  const Int8GemmParams& params_;
};

template <class Out>
void multiply_int8(const Int8GemmParams& params) {
  const Int8BlockKernel kernel = select_int8_block_kernel();
  const Int8Tokens x(params);
  const Int8Finish finish(params);
  const auto multiply = [&](int64_t first_row, int64_t first_token) {
    int32_t sums[kInt8CpuMaxTokens * kInt8CpuRows];
    const int64_t num_rows = std::min<int64_t>(params.n - first_row, kInt8CpuRows);
    const int64_t num_tokens = std::min<int64_t>(params.m - first_token, kInt8CpuMaxTokens);
    kernel({
        .weight = params.weight + first_row * params.stride_weight_n,
        .stride_weight = params.stride_weight_n,
        .num_rows = static_cast<int>(num_rows),
        .k = params.k,
        .x = reinterpret_cast<const int8_t*>(x.lines.data() + first_token * x.lines_per_token),
        .stride_x = x.lines_per_token * kInt8CpuTileK,
        .x_sums = x.sums.data() + first_token,
        .num_tokens = static_cast<int>(num_tokens),
        .sums = sums,
    });
    for (int64_t token = 0; token < num_tokens; ++token) {
      const int64_t m = first_token + token;
      Out* out = static_cast<Out*>(params.out) + m * params.n + first_row;
      for (int64_t row = 0; row < num_rows; ++row) {
        const int32_t sum = sums[token * kInt8CpuRows + row];
        out[row] = from_float<Out>(finish(m, first_row + row, sum));
      }
    }
  };

  // Threads pay off from some hundred thousand products each.
  const int64_t grain =
      ceil_div<int64_t>(int64_t{1} << 17, kInt8CpuRows * (params.k + 1) *
                                              std::min<int64_t>(params.m + 1, kInt8CpuMaxTokens));
  TorchThreads().for_each(ceil_div<int64_t>(params.n, kInt8CpuRows), grain, [&](int64_t block) {
    for (int64_t token = 0; token < params.m; token += kInt8CpuMaxTokens) {
      multiply(block * kInt8CpuRows, token);
    }
  });
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
