// How GEMMs of 8-bit operands are cut on Hopper: host code alone. What bounds the kernels stands in
// ss_gemm_sm90.cuh.
#include <algorithm>
#include <cstdint>
#include <span>

#include "common/math.h"
#include "gemm/ss_gemm_sm90.h"

namespace effllm {
namespace {

// Nanoseconds that a GEMM takes by a model, but for what all take: tiles and reductions, and stages
// of K at the rate at which a multiprocessor multiplies or loads them. Fitted to the choice between
// all plans of fp8_gemm, int8_gemm and w4a8_gemm for 13 layers of Llamas, Qwens and DeepSeek-V3 and
// 1 to 4096 tokens on an H100 80GB HBM3: by way to scale and sum, choices were 0.4 to 1.5 % slower
// than the best plans, the worst one 26 %.
class TimeModel {
 public:
  TimeModel(const SsGemmProblem& problem, const SsGemmCandidate& candidate, int num_sms)
      : tile_(candidate.tile),
        stage_time_(candidate.stage_time),
        weight_bits_(problem.weight_bits),
        sum_time_(problem.sum_time),
        num_sms_(num_sms),
        k_tiles_(ceil_div<int64_t>(problem.k, 128)),
        row_tiles_(ceil_div<int64_t>(tile_.token_rows ? problem.m : problem.n, tile_.rows())),
        col_tiles_(ceil_div<int64_t>(tile_.token_rows ? problem.n : problem.m, tile_.cols)) {}

  int64_t k_tiles() const { return k_tiles_; }

  // What it was fitted to: tiles neither half empty nor, for few tokens each, many; and no
  // neighbour all of whose rows are beyond the matrix, which makes TMA slow for the others, too.
  bool applies_to(int64_t m) const {
    const int tokens = tile_.tokens();
    return tokens <= std::max<int64_t>(16, 2 * m) &&
           (tokens > 64 || m <= (tokens == 64 ? 512 : tokens)) &&
           row_tiles_ % tile_.neighbours == 0;
  }

  double operator()(const SsGemmPlan& cut) const {
    const int64_t tiles = row_tiles_ / tile_.neighbours * col_tiles_;
    const int64_t pieces = cut.ctas / tile_.neighbours;
    const auto whole_time = [&](int64_t busy) {
      return kTile + static_cast<double>(k_tiles_) * stage_time(busy, tile_.neighbours);
    };
    double time = (tile_.ctas_per_sm > 1 ? kShared : 0) + (tile_.neighbours > 1 ? kNeighbours : 0);
    time += static_cast<double>(tiles / pieces) * whole_time(pieces * tile_.neighbours);
    int64_t rest = tiles % pieces;
    if (cut.slices == 1) return rest == 0 ? time : time + whole_time(rest * tile_.neighbours);
    const int cluster = cut.slices * tile_.neighbours;
    for (const int64_t clusters = pieces / cut.slices; rest > 0; rest -= clusters) {
      time += kReduce + kReduceSlice * cut.slices + sum_time_ * tile_.rows() * tile_.cols;
      time += static_cast<double>(ceil_div<int64_t>(k_tiles_, cut.slices)) *
              stage_time(std::min(rest, clusters) * cluster, cluster);
    }
    return time;
  }

 private:
  static constexpr double kShared = 2100, kNeighbours = 3300, kTile = 860, kReduce = 960,
                          kReduceSlice = 350, kStageBytesPerNanosecond = 67;

  // Large clusters are put on few multiprocessors, even where others are idle.
  double stage_time(int64_t busy, int cluster) const {
    const bool crowded = cluster >= 4 && busy * 11 > int64_t{num_sms_} * 8;
    const auto per_sm =
        static_cast<double>(std::max<int64_t>(ceil_div<int64_t>(busy, num_sms_), crowded ? 2 : 1));
    const double bytes = (tile_.tokens() + tile_.features() * weight_bits_ / 8) * 128;
    return per_sm * std::max<double>(stage_time_, bytes / kStageBytesPerNanosecond);
  }

  const SsGemmShape tile_;
  const int stage_time_, weight_bits_;
  const double sum_time_;
  const int num_sms_;
  const int64_t k_tiles_, row_tiles_, col_tiles_;
};

}  // namespace

SsGemmChoice plan_ss_gemm(const SsGemmProblem& problem, std::span<const SsGemmCandidate> candidates,
                          int num_sms) {
  SsGemmChoice best{};
  double best_time = 1e30;
  for (size_t index = 0; index < candidates.size(); ++index) {
    const SsGemmCandidate& candidate = candidates[index];
    if (candidate.stage_time == 0) continue;
    const bool splits = candidate.residency[1] > 0;
    if (!splits && problem.out_dtype == DType::kFloat32) continue;
    const TimeModel model(problem, candidate, num_sms);
    if (!model.applies_to(problem.m)) continue;
    for (const int slices : {1, 2, 3, 4, 6, 8}) {
      if (slices > model.k_tiles() || (slices > 1 && !splits)) break;
      const int cluster = slices * candidate.tile.neighbours;
      if (cluster > kMaxClusterCtas) break;
      // Whole tiles leave room for the CTAs of the next kernel.
      const int clusters = std::min(candidate.residency[static_cast<size_t>(slices - 1)],
                                    slices == 1 ? num_sms / cluster : num_sms * 2);
      if (clusters == 0) continue;
      const SsGemmPlan cut{clusters * cluster, slices};
      const double time = model(cut);
      if (time < best_time) best_time = time, best = {index, cut};
    }
  }
  return best;
}

}  // namespace effllm
