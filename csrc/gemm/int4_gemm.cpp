// int4_gemm: schema and CPU implementation.
//
// Here x, scales and zero points of any type become floats where the inner loop wants them; that
// loop is int4_gemm_strip.h, compiled once per instruction set.
#include "gemm/int4_gemm.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/torch.h"
#include "gemm/int4_gemm_strip.h"

namespace effllm {
namespace {

static_assert(kInt4CpuRows == kInt4StripRows && kInt4CpuTileWords == kInt4TileWords);

using Int4StripKernel = void (*)(const Int4Strip&);

Int4StripKernel select_strip_kernel() {
  if constexpr (kHasX86Isas) {
    if (cpu_isa() == CpuIsa::kAvx512) return int4_strip_avx512;
    if (cpu_isa() == CpuIsa::kAvx2) return int4_strip_avx2;
  }
  return multiply_strip<4>;
}

// x as [num_tiles, M, 64] in fragment order (int4_gemm_strip.h), fp32, padded with zeros to whole
// tiles.
template <class T>
void gather_x(const Int4GemmParams& params, int64_t num_tiles, float* fragments) {
  parallel_for(0, params.m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* row = static_cast<const T*>(params.x) + m * params.k;
      for (int64_t step = 0; step < num_tiles * (kInt4CpuTileK / kInt4CpuStep); ++step) {
        const int64_t first = step * kInt4CpuStep;
        float columns[kInt4CpuStep] = {};
        const int64_t count = std::min<int64_t>(params.k - first, kInt4CpuStep);
        if (count == kInt4CpuStep) {
          for (int idx = 0; idx < kInt4CpuStep; ++idx) columns[idx] = to_float(row[first + idx]);
        } else {
          for (int64_t idx = 0; idx < count; ++idx) columns[idx] = to_float(row[first + idx]);
        }
        float* out = fragments + (first / kInt4CpuTileK * params.m + m) * kInt4CpuTileK +
                     first % kInt4CpuTileK;
        for (int idx = 0; idx < kInt4CpuStep; ++idx) {
          const int quad = idx / 4, byte = idx % 4;
          out[idx] = columns[2 * quad + 8 * (byte % 2) + byte / 2];
        }
      }
    }
  });
}

constexpr int64_t slot_of_row(int64_t row) { return row / 16 * 16 + row % 8 * 2 + row % 16 / 8; }

// What one thread works in: scales and zero points of a strip, and sums of a block of tokens.
struct Workspace {
  // Room for a last tile that has one group of two. An odd number of cache lines: the 64 rows of a
  // group would else compete for few sets of L1.
  static int64_t stride(const Int4GemmParams& params) {
    return (ceil_div<int64_t>(params.num_groups + 1, 16) | 1) * 16;
  }

  static int64_t size(const Int4GemmParams& params) {
    return kInt4CpuRows * (2 * stride(params) + kInt4CpuMaxTokens + 1);
  }

  Workspace(float* memory, const Int4GemmParams& params)
      : scales(memory),
        zeros(scales + kInt4CpuRows * stride(params)),
        sums(zeros + kInt4CpuRows * stride(params)),
        bias(sums + kInt4CpuRows * kInt4CpuMaxTokens) {}

  float *scales, *zeros;  // [64 slots, stride]
  float* sums;            // [kInt4CpuMaxTokens, 64 slots]
  float* bias;            // [64 rows]
};

template <class T>
void load_groups(const T* data, int64_t stride_n, int64_t stride_g, int64_t num_rows,
                 int64_t num_groups, float* table, int64_t stride_table) {
  for (int64_t row = 0; row < num_rows; ++row, data += stride_n) {
    float* out = table + slot_of_row(row) * stride_table;
    for (int64_t group = 0; group < num_groups; ++group) {
      if constexpr (std::is_same_v<T, uint8_t>) {
        out[group] = data[group * stride_g] + kInt4CpuCodeBias;
      } else {
        out[group] = to_float(data[group * stride_g]);
      }
    }
    // Columns past the last group are multiplied by x = 0; their scale must be no NaN.
    out[num_groups] = out[num_groups - 1];
  }
}

void load_strip(const Int4GemmParams& params, int64_t first_row, int64_t num_rows,
                const Workspace& work) {
  const int64_t stride = Workspace::stride(params);
  if (params.num_groups > 0) {
    dispatch_float(params.scales_dtype, [&](auto element) {
      load_groups(
          static_cast<const decltype(element)*>(params.scales) + first_row * params.stride_scales_n,
          params.stride_scales_n, params.stride_scales_g, num_rows, params.num_groups, work.scales,
          stride);
    });
    if (params.zeros != nullptr) {
      load_groups(params.zeros + first_row * params.stride_zeros_n, params.stride_zeros_n,
                  params.stride_zeros_g, num_rows, params.num_groups, work.zeros, stride);
    }
  }
  if (params.bias != nullptr) {
    for (int64_t row = 0; row < num_rows; ++row) {
      work.bias[row] =
          load_float(params.bias, params.bias_dtype, (first_row + row) * params.stride_bias);
    }
  }
}

// A block of tokens of one strip.
struct Task {
  int64_t strip, first_row, num_rows, first_token, num_tokens;
};

Task task_at(const Int4GemmParams& params, int64_t index, int64_t num_blocks) {
  const int64_t first_row = index / num_blocks * kInt4CpuRows;
  const int64_t first_token = index % num_blocks * kInt4CpuMaxTokens;
  return {index / num_blocks, first_row, std::min<int64_t>(params.n - first_row, kInt4CpuRows),
          first_token, std::min<int64_t>(params.m - first_token, kInt4CpuMaxTokens)};
}

template <class T>
void run_task(const Int4GemmParams& params, const Task& task, const float* x, int64_t num_tiles,
              const Workspace& work, Int4StripKernel strip_kernel) {
  strip_kernel({
      .words = params.qweight + task.strip * params.stride_qweight_strip,
      .num_tiles = num_tiles,
      .num_rows = static_cast<int>(task.num_rows),
      .x = x + task.first_token * kInt4CpuTileK,
      .stride_x_tile = params.m * kInt4CpuTileK,
      .num_tokens = static_cast<int>(task.num_tokens),
      .scales = work.scales,
      .zeros = work.zeros,
      .stride_scales = Workspace::stride(params),
      .tiles_per_group = ceil_div<int64_t>(params.group_size, kInt4CpuTileK),
      .two_groups_per_tile = params.group_size < kInt4CpuTileK && params.num_groups > 1,
      .sums = work.sums,
  });
  for (int64_t token = 0; token < task.num_tokens; ++token) {
    const float* sums = work.sums + token * kInt4CpuRows;
    T* out = static_cast<T*>(params.out) + (task.first_token + token) * params.n + task.first_row;
    for (int64_t row = 0; row < task.num_rows; ++row) {
      out[row] = from_float<T>(sums[slot_of_row(row)] + work.bias[row]);
    }
  }
}

template <class T>
void int4_gemm(const Int4GemmParams& params) {
  const Int4StripKernel strip_kernel = select_strip_kernel();
  const int64_t num_tiles = ceil_div<int64_t>(params.k, kInt4CpuTileK);
  std::vector<float> x(num_tiles * params.m * kInt4CpuTileK);
  gather_x<T>(params, num_tiles, x.data());

  // A strip's tasks follow each other. All memory is there before the threads start: an exception
  // in one of them would end the process.
  const int64_t num_blocks = ceil_div<int64_t>(params.m, kInt4CpuMaxTokens);
  const int64_t num_tasks = int4_num_strips(params.n) * num_blocks;
  const int64_t num_workers = std::min<int64_t>(torch::stable::get_num_threads(), num_tasks);
  std::vector<float> memory(num_workers * Workspace::size(params));
  parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const Workspace work(memory.data() + worker * Workspace::size(params), params);
      std::fill(work.zeros, work.sums, kInt4PaddingCode + kInt4CpuCodeBias);
      int64_t loaded_strip = -1;
      const int64_t last = num_tasks * (worker + 1) / num_workers;
      for (int64_t idx = num_tasks * worker / num_workers; idx < last; ++idx) {
        const Task task = task_at(params, idx, num_blocks);
        if (task.strip != loaded_strip) load_strip(params, task.first_row, task.num_rows, work);
        loaded_strip = task.strip;
        run_task<T>(params, task, x.data(), num_tiles, work, strip_kernel);
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
