// How work is cut for packed_gemm_narrow_sm90.cuh: host code alone.
#include <algorithm>

#include "common/math.h"
#include "gemm/packed_gemm_narrow_sm90.h"

namespace effllm {

PackedGemmNarrowSplit::PackedGemmNarrowSplit(const PackedGemmParams& params,
                                             const PackedGemmNarrowShape& shape, int k_slices) {
  const auto tiles = static_cast<int>(ceil_div<int64_t>(params.k, kPackedGemmNarrowTileK));
  blocks = ceil_div<int64_t>(params.n, shape.rows()) * ceil_div<int64_t>(params.m, shape.tokens);
  tiles_per_slice = round_up(ceil_div(tiles, k_slices), shape.stage_tiles);
  group_tiles = params.num_groups == 1
                    ? tiles_per_slice
                    : static_cast<int>(params.group_size / kPackedGemmNarrowTileK);
  smem_bytes = 1024 + shape.stages * shape.stage_bytes() +
               tiles_per_slice / group_tiles * shape.rows() * kPackedGemmRowGroupBytes;
}

// The quickest by a model in microseconds, fitted to the times of all plans for twelve shapes of
// Llamas' layers on an H100: the longer of two bounds, the slowest CTA's way and the work of all,
// and a part of the other. Its choices were 2 % slower than the best plans, the worst one 17 %.
std::optional<PackedGemmNarrowPlan> plan_packed_gemm_narrow(
    const PackedGemmParams& params, int num_sms, const PackedGemmNarrowResidency& residency) {
  constexpr double kStart = 2.448, kCta = 0.22, kReduce = 1.796, kReduceSlice = 0.008,
                   kOther = 0.228;
  constexpr int64_t kSmemPerSm = 227 * 1024, kSmemPerCta = 1024;
  const int64_t tiles = ceil_div<int64_t>(params.k, kPackedGemmNarrowTileK);
  std::optional<PackedGemmNarrowPlan> best;
  double best_time = 1e30;
  for (size_t index = 0; index < kPackedGemmNarrowShapes.size(); ++index) {
    const PackedGemmNarrowShape& shape = kPackedGemmNarrowShapes[index];
    if (shape.tokens != (params.m <= 16 ? 16 : 32)) continue;
    for (int slices = 1; slices <= kMaxClusterCtas && slices <= tiles; ++slices) {
      const PackedGemmNarrowSplit split(params, shape, slices);
      const int64_t fitting =
          std::min<int64_t>(shape.ctas_per_sm, kSmemPerSm / (split.smem_bytes + kSmemPerCta));
      if (fitting == 0) continue;
      // Clusters of two CTAs per multiprocessor are what the driver was asked about.
      const int64_t resident_at_two =
          std::max<int64_t>(1, residency[static_cast<size_t>(slices - 1)]);
      const int64_t resident = std::max<int64_t>(1, resident_at_two * fitting / 2);
      // As few to a multiprocessor as let all clusters of a round run: those of many CTAs fit into
      // its group of multiprocessors less often than their number says.
      const int64_t clusters = std::min(split.blocks, resident);
      const int64_t ctas_per_sm =
          std::min(fitting, std::max(ceil_div<int64_t>(clusters * slices, num_sms),
                                     ceil_div(clusters * 2, resident_at_two)));
      const double cta = kCta + kReduceSlice * slices + (slices > 1 ? kReduce : 0.0);
      const double tile = shape.lone_tile + shape.other_tile * static_cast<double>(ctas_per_sm - 1);
      const double longest = static_cast<double>(ceil_div(split.blocks, resident)) *
                             (cta + split.tiles_per_slice * tile);
      const double work = static_cast<double>(split.blocks * slices * split.tiles_per_slice) *
                          shape.shared_tile / num_sms;
      const double time = kStart + std::max(longest, work) + kOther * std::min(longest, work);
      if (time >= best_time) continue;
      best_time = time;
      // A launch that starts early would put more CTAs on the multiprocessors that it finds free.
      const int64_t min_smem_bytes = kSmemPerSm / (ctas_per_sm + 1) - kSmemPerCta + 1;
      best = {index, slices, ctas_per_sm < fitting ? min_smem_bytes : 0, time};
    }
  }
  return best;
}

}  // namespace effllm
