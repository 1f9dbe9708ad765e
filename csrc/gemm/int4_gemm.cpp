#include "gemm/int4_gemm.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

// Sixteen consecutive words of a tile hold two rows: all 64 codes of row n (for one n % 8 of a
// 16-row block) and all of row n + 8. Lane j of the sixteen is columns around 16 * (j % 4) + 2 * (j
// / 4), and each of a word's four codes per row is one more offset. Keeping x in that order
// ("fragment order") turns dequantisation into shifts of whole vectors, without a shuffle.
constexpr int kLanes = 16;
constexpr int kTileK = 64;

constexpr int64_t fragment_column(int offset, int lane) {
  const int col_half = offset / 2, odd = offset % 2;
  return 16 * (lane % 4) + 8 * col_half + 2 * (lane / 4) + odd;
}

// x[m, :] in fragment order, fp32, padded with zeros to whole tiles.
template <class T>
void gather_x(const Int4GemmParams& params, int64_t num_tiles, float* fragments) {
  const T* x = static_cast<const T*>(params.x);
  parallel_for(0, params.m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* row = x + m * params.k;
      float* out = fragments + m * num_tiles * kTileK;
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        for (int offset = 0; offset < 4; ++offset) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t k = tile * kTileK + fragment_column(offset, lane);
            *out++ = k < params.k ? to_float(row[k]) : 0.0f;
          }
        }
      }
    }
  });
}

// Row n of W in fragment order, fp32. Columns past K get the last group's scale; x is zero there.
void dequantize_row(const Int4GemmParams& params, int64_t n, int64_t num_tiles, float* weights) {
  const int row_half = static_cast<int>((n % 16) / 8);
  const int32_t* words = params.qweight + (n / kInt4StripRows) * params.stride_qweight_strip +
                         int4_word(n % kInt4StripRows, 0);
  for (int64_t tile = 0; tile < num_tiles; ++tile, words += kInt4TileWords) {
    // Groups are multiples of 16 columns, or all of them: lanes j, j + 4, .. share one.
    float scale[kLanes], zero[kLanes];
    for (int step = 0; step < 4; ++step) {
      const int64_t k = tile * kTileK + 16 * step;
      const int64_t group = std::min(k / params.group_size, params.num_groups - 1);
      const float group_scale =
          load_float(params.scales, params.scales_dtype,
                     n * params.stride_scales_n + group * params.stride_scales_g);
      const float group_zero =
          params.zeros == nullptr
              ? static_cast<float>(kInt4PaddingCode)
              : params.zeros[n * params.stride_zeros_n + group * params.stride_zeros_g];
      for (int lane = step; lane < kLanes; lane += 4) {
        scale[lane] = group_scale;
        zero[lane] = group_zero;
      }
    }
    for (int offset = 0; offset < 4; ++offset) {
      const int shift = int4_shift(row_half, offset / 2, offset % 2);
      for (int lane = 0; lane < kLanes; ++lane) {
        const auto code = static_cast<int32_t>((static_cast<uint32_t>(words[lane]) >> shift) & 15u);
        *weights++ = (static_cast<float>(code) - zero[lane]) * scale[lane];
      }
    }
  }
}

// Dot products of one weight row with `kRows` rows of x.
template <int kRows>
void dot(const float* weights, const float* x, int64_t length, float* sums) {
  float lanes[kRows][kLanes] = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    for (int row = 0; row < kRows; ++row) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[row][lane] += weights[k + lane] * x[row * length + k + lane];
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    sums[row] = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sums[row] += lanes[row][lane];
  }
}

template <class T>
void int4_gemm(const Int4GemmParams& params) {
  const int64_t num_tiles = ceil_div<int64_t>(params.k, kTileK), length = num_tiles * kTileK;
  std::vector<float> x(params.m * length);
  gather_x<T>(params, num_tiles, x.data());
  T* out = static_cast<T*>(params.out);

  constexpr int64_t kRowsPerTask = 16;
  constexpr int kTokenBlock =
      4;  // tokens per pass over a dequantised row: their sums stay in registers
  parallel_for(0, ceil_div(params.n, kRowsPerTask), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(length);
    const int64_t last = std::min(end * kRowsPerTask, params.n);
    for (int64_t n = begin * kRowsPerTask; n < last; ++n) {
      dequantize_row(params, n, num_tiles, weights.data());
      const float bias = params.bias == nullptr
                             ? 0.0f
                             : load_float(params.bias, params.bias_dtype, n * params.stride_bias);
      for (int64_t m = 0; m < params.m;) {
        float sums[kTokenBlock];
        const bool whole_block = m + kTokenBlock <= params.m;
        const int tokens = whole_block ? kTokenBlock : 1;
        if (whole_block) {
          dot<kTokenBlock>(weights.data(), x.data() + m * length, length, sums);
        } else {
          dot<1>(weights.data(), x.data() + m * length, length, sums);
        }
        for (int token = 0; token < tokens; ++token) {
          out[(m + token) * params.n + n] = from_float<T>(sums[token] + bias);
        }
        m += tokens;
      }
    }
  });
}

Tensor int4_gemm_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                     int64_t group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Int4GemmParams params =
      check_int4_gemm(as_view(x_rows, "x"), as_view(qweight, "qweight"), as_view(scales, "scales"),
                      as_view(zeros, "zeros"), as_view(bias, "bias"), group_size);
  Tensor out = new_empty_like_rows(x, params.n);
  params.out = out.mutable_data_ptr();
  dispatch_float(params.dtype, [&](auto element) { int4_gemm<decltype(element)>(params); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "int4_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros=None, Tensor? bias=None, "
      "*, "
      "int group_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("int4_gemm", TORCH_BOX(&int4_gemm_cpu)); }

}  // namespace effllm
