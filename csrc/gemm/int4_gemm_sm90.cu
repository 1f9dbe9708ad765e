// Which kernel int4_gemm takes on Hopper, and how its work is cut: host code alone. What bounds the
// kernels stands in their own files.
#include <algorithm>
#include <optional>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "gemm/int4_gemm_sm90.h"

namespace effllm {
namespace {

// Microseconds that the kernel for up to 8 tokens takes, within some 10 % of what an H100 took:
// what every launch costs, a multiprocessor's codes and scales, and x, of which each has all.
double int4_gemm_direct_time(const Int4GemmParams& params, int num_sms) {
  constexpr double kStart = 2.9, kCodesPerMicrosecond = 45e3, kXBytesPerMicrosecond = 45e3;
  const auto turns =
      static_cast<double>(ceil_div<int64_t>(ceil_div<int64_t>(params.n, 16), num_sms));
  const auto k = static_cast<double>(params.k);
  return kStart + turns * 16 * k / kCodesPerMicrosecond +
         2 * static_cast<double>(params.m) * k / kXBytesPerMicrosecond;
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
  const int64_t k_tiles = ceil_div<int64_t>(k, kInt4GemmTileK);
  Int4GemmWidePlan best{};
  double best_time = 1e30;
  for (size_t index = 0; index < kInt4GemmWideShapes.size(); ++index) {
    const Int4GemmWideShape& shape = kInt4GemmWideShapes[index];
    const int64_t tiles = ceil_div<int64_t>(n, shape.rows()) * ceil_div<int64_t>(m, shape.tokens);
    for (int64_t slices = 1; slices <= std::min<int64_t>(kMaxClusterCtas, k_tiles); ++slices) {
      const int64_t clusters = residency[index][static_cast<size_t>(slices - 1)];
      if (clusters == 0) continue;
      const int64_t ctas = clusters * slices;
      // A round of so many CTAs. Those of larger clusters are put on few multiprocessors, even
      // where others are idle.
      const auto tile_time = [&](int64_t active) {
        return slices < 4 && active <= num_sms ? shape.lone_tile : shape.shared_tile;
      };
      const auto whole_time = [&](int64_t active) {
        return kTile + static_cast<double>(k_tiles * tile_time(active));
      };
      const double reduce = kReduce + kReduceSlice * static_cast<double>(slices) +
                            kReduceValue * shape.tokens * shape.rows();
      const auto split_time = [&](int64_t active) {
        return reduce + static_cast<double>(ceil_div(k_tiles, slices) * tile_time(active));
      };
      double time = kStart + static_cast<double>(tiles / ctas) * whole_time(ctas);
      const int64_t rest = tiles % ctas;
      if (slices == 1) {
        if (rest > 0) time += whole_time(rest);
      } else {
        time += static_cast<double>(rest / clusters) * split_time(ctas);
        if (rest % clusters > 0) time += split_time(rest % clusters * slices);
      }
      if (time < best_time) {
        best_time = time;
        best = {index, static_cast<int>(slices), static_cast<int>(ctas), time / 1000};
      }
    }
  }
  return best;
}

bool launch_int4_gemm_sm90(const Int4GemmParams& params, int device, cudaStream_t stream) {
  // What copies of x in pieces of 16 bytes ask for.
  if (params.k == 0 || params.k % 8 != 0 || !is_aligned(params.x)) return false;
  const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device, "int4_gemm");
  // The others work on tiles of 64 columns.
  const bool whole_tile_groups = params.group_size >= kInt4GemmTileK || params.num_groups == 1;
  // Only the kernel for few tokens gathers x while it loads it.
  if (params.perm != nullptr) {
    return params.m <= kInt4GemmDirectTokens &&
           launch_int4_gemm_direct_sm90(params, num_sms, stream);
  }
  const bool takes_wide = params.m > kPackedGemmNarrowTokens && whole_tile_groups &&
                          params.n % 8 == 0 && is_aligned(params.out);
  static PerDevice<PackedGemmNarrowResidency> narrow_residency;
  std::optional<PackedGemmNarrowPlan> narrow;
  if (whole_tile_groups && (!takes_wide || params.m <= kInt4GemmNarrowTokens)) {
    narrow = plan_packed_gemm_narrow(params, num_sms,
                                     narrow_residency.get(device, int4_gemm_narrow_residency));
  }
  if (params.m <= kInt4GemmDirectTokens &&
      (!narrow || int4_gemm_direct_time(params, num_sms) < narrow->time) &&
      launch_int4_gemm_direct_sm90(params, num_sms, stream)) {
    return true;
  }
  if (takes_wide) {
    // The other model was fitted to fewer tokens; where it says so much less, it is right.
    constexpr double kMargin = 1.5;
    static PerDevice<Int4GemmResidency> wide_residency;
    const auto wide = plan_int4_gemm_wide(params.m, params.n, params.k, num_sms,
                                          wide_residency.get(device, int4_gemm_wide_residency));
    if (!narrow || narrow->time + kMargin > wide.time) {
      launch_int4_gemm_wide_sm90(params, wide, stream);
      return true;
    }
  }
  if (narrow) launch_int4_gemm_narrow_sm90(params, *narrow, stream);
  return narrow.has_value();
}

}  // namespace effllm
