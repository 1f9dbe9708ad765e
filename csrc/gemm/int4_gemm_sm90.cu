// Which wgmma kernel int4_gemm takes, and how its work is cut: host code alone. What bounds the
// kernels stands in their own files.
#include <algorithm>
#include <mutex>
#include <vector>

#include "common/math.h"
#include "cuda/launch.h"
#include "gemm/int4_gemm_sm90.h"

namespace effllm {
namespace {

constexpr int kTileK = 64;

// Asked of the driver once per device.
Int4GemmResidency residency_of(int device) {
  static std::mutex mutex;
  static std::vector<std::optional<Int4GemmResidency>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto index = static_cast<size_t>(device);
  if (known.size() <= index) known.resize(index + 1);
  if (!known[index]) known[index] = int4_gemm_wide_residency();
  return *known[index];
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

// The quickest by a model in nanoseconds, fitted to the times of all plans for 35 problems on an
// H100: what every launch and every tile costs beside its tiles of K, and what it takes a cluster
// to add its slices. Its choices were 0.5 % slower than the best plans, the worst one 13 %.
Int4GemmWidePlan plan_int4_gemm_wide(int64_t m, int64_t n, int64_t k, int num_sms,
                                     const Int4GemmResidency& residency) {
  constexpr double kStart = 2800, kTile = 800, kReduce = 1000, kReduceSlice = 360,
                   kReduceValue = 0.11;
  const int64_t k_tiles = ceil_div<int64_t>(k, kTileK);
  Int4GemmWidePlan best{};
  double best_time = 1e30;
  for (size_t index = 0; index < kInt4GemmWideShapes.size(); ++index) {
    const Int4GemmWideShape& shape = kInt4GemmWideShapes[index];
    const int64_t tiles = ceil_div<int64_t>(n, shape.rows()) * ceil_div<int64_t>(m, shape.tokens);
    for (int64_t slices = 1; slices <= std::min<int64_t>(kMaxClusterCtas, k_tiles); ++slices) {
      const int64_t clusters = residency[index][static_cast<size_t>(slices - 1)];
      if (clusters == 0) continue;
      const int64_t ctas = clusters * slices;
      const int64_t whole = slices == 1 ? ceil_div(tiles, ctas) : tiles / ctas;
      const int64_t split = slices == 1 ? 0 : tiles - whole * ctas;
      // The CTAs of larger clusters are put on few multiprocessors, even where others are idle.
      const bool lone = slices < 4 && std::min(ctas, tiles * slices) <= num_sms;
      const double tile = lone ? shape.lone_tile : shape.shared_tile;
      const double reduce = kReduce + kReduceSlice * static_cast<double>(slices) +
                            kReduceValue * shape.tokens * shape.rows();
      const double time =
          kStart + static_cast<double>(whole) * (kTile + static_cast<double>(k_tiles) * tile) +
          static_cast<double>(ceil_div(split, clusters)) *
              (reduce + static_cast<double>(ceil_div(k_tiles, slices)) * tile);
      if (time < best_time) {
        best_time = time;
        best = {index, static_cast<int>(slices), static_cast<int>(ctas)};
      }
    }
  }
  return best;
}

bool launch_int4_gemm_sm90(const Int4GemmParams& params, int device, cudaStream_t stream) {
  // What TMA and 64-column tiles ask for.
  const bool whole_tile_groups = params.group_size >= kTileK || params.num_groups == 1;
  if (params.k == 0 || params.k % 8 != 0 || !is_aligned(params.x) || !whole_tile_groups) {
    return false;
  }
  const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device, "int4_gemm");
  if (params.m > kInt4GemmNarrowTokens && params.n % 8 == 0 && is_aligned(params.out)) {
    launch_int4_gemm_wide_sm90(
        params, plan_int4_gemm_wide(params.m, params.n, params.k, num_sms, residency_of(device)),
        stream);
    return true;
  }
  const auto plan = plan_int4_gemm_narrow(params, num_sms);
  if (plan) launch_int4_gemm_narrow_sm90(params, *plan, stream);
  return plan.has_value();
}

}  // namespace effllm
