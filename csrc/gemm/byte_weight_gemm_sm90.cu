// How GEMMs of weights of a byte each are cut on Hopper: host code alone. What bounds the kernel
// stands in byte_weight_gemm_sm90.cuh.
#include <algorithm>
#include <cstdint>
#include <span>

#include "common/math.h"
#include "gemm/byte_weight_gemm_sm90.h"

namespace effllm {
namespace {

bool is_taken(const Fp8GemmParams& params) {
  constexpr int kMinTokens = 9;       // fewer are not what its tiles were made for
  constexpr int64_t kAlignment = 16;  // bytes
  const auto is_aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
  };
  return params.m >= kMinTokens && params.k > 0 && params.k * 2 % kAlignment == 0 &&
         is_aligned(params.x) && params.stride_weight_n >= params.k &&
         params.stride_weight_n % kAlignment == 0 && is_aligned(params.weight) &&
         params.n * 2 % kAlignment == 0 && is_aligned(params.out);
}

}  // namespace

bool launch_int8_weight_gemm_sm90(const Fp8GemmParams& params, int device, cudaStream_t stream) {
  if (!is_taken(params)) return false;
  if (params.grouped()) {
    launch_int8_weight_gemm_group_sm90(params, device, stream);
  } else {
    launch_int8_weight_gemm_channel_sm90(params, device, stream);
  }
  return true;
}

bool launch_fp8_weight_gemm_sm90(const Fp8GemmParams& params, int device, cudaStream_t stream) {
  if (!is_taken(params)) return false;
  if (params.grouped()) {
    launch_fp8_weight_gemm_group_sm90(params, device, stream);
  } else {
    launch_fp8_weight_gemm_channel_sm90(params, device, stream);
  }
  return true;
}

// The quickest by a model in nanoseconds, fitted to the times of all plans for 28 problems with
// scales of rows and 28 with groups on an H100: what a tile costs beside its columns of K, what it
// takes a cluster to add its slices, and the memory's share, of which CTAs that read the same rows
// of W need less. Timed afterwards, choices are at most 3 % slower than the best plans, with groups
// 6 %.
ByteWeightPlan plan_byte_weight_gemm(int64_t m, int64_t n, int64_t k,
                                     std::span<const ByteWeightShape> shapes,
                                     std::span<const ByteWeightResidency> residency) {
  constexpr double kTileToken = 18, kReduce = 1300, kReduceSlice = 90, kReduceToken = 20;
  constexpr double kTraffic = 2.7;  // of 64 columns of a tile of W, times the CTAs that load some
  const int64_t k_tiles = ceil_div<int64_t>(k, 64);
  ByteWeightPlan best{};
  double best_time = 1e30;
  for (size_t index = 0; index < shapes.size(); ++index) {
    const ByteWeightShape& shape = shapes[index];
    const int64_t col_tiles = ceil_div<int64_t>(m, shape.tokens);
    const int64_t tiles = ceil_div<int64_t>(n, kByteWeightRows) * col_tiles;
    for (int64_t slices = 1;
         slices <= std::min<int64_t>(kMaxClusterCtas, ceil_div<int64_t>(k_tiles, shape.panels));
         ++slices) {
      const int64_t clusters = residency[index][static_cast<size_t>(slices - 1)];
      if (clusters == 0) continue;
      const int64_t ctas = clusters * slices;
      const auto columns_time = [&](int64_t columns, int64_t active) {
        const double traffic = kTraffic / static_cast<double>(std::min<int64_t>(col_tiles, 2));
        return static_cast<double>(columns) *
               std::max<double>(shape.time, traffic * static_cast<double>(active));
      };
      const auto whole_time = [&](int64_t active) {
        return kTileToken * shape.tokens + columns_time(k_tiles, active);
      };
      const double reduce =
          kReduce + kReduceSlice * static_cast<double>(slices) + kReduceToken * shape.tokens;
      const auto split_time = [&](int64_t active) {
        return reduce + columns_time(ceil_div(k_tiles, slices), active);
      };
      double time = static_cast<double>(tiles / ctas) * whole_time(ctas);
      const int64_t rest = tiles % ctas;
      if (slices == 1) {
        if (rest > 0) time += whole_time(rest);
      } else {
        time += static_cast<double>(rest / clusters) * split_time(ctas);
        if (rest % clusters > 0) time += split_time(rest % clusters * slices);
      }
      if (time < best_time) {
        best_time = time;
        best = {index, static_cast<int>(slices), static_cast<int>(ctas)};
      }
    }
  }
  return best;
}

}  // namespace effllm
