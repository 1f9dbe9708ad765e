// How work is cut for byte_weight_gemm_direct_sm90.cuh: host code alone.
#include <algorithm>

#include "common/math.h"
#include "gemm/byte_weight_gemm_direct_sm90.h"

namespace effllm {
namespace {

constexpr int64_t kBlockRows = 16, kMaxSmemBytes = 227 * 1024;

// Nanoseconds that a launch takes on an H100, fitted to measurements. What is chosen by it takes
// 0.3 % longer than the best cut measured on average over 24 problems, 2.2 % at most.
double launch_time(const ByteWeightDirectCut& cut, int64_t clusters, int64_t m, int64_t n,
                   int64_t k) {
  constexpr double kStepBytes = kBlockRows * kByteWeightDirectStepK;
  constexpr double kMemoryRate = 3110, kXRate = 45;  // bytes a nanosecond; the latter of a CTA
  constexpr double kLaunch = 3060, kTurn = 30, kExchange = 320, kExchangeTile = 3;
  // As long as memory keeps up, a warp gets its steps at a rate of its own.
  const int tiles = m <= 8 ? 1 : 2;
  const double warp_rate = tiles == 1 ? 1.85 : 1.72;
  const int64_t steps = ceil_div<int64_t>(k, kByteWeightDirectStepK), parts = cut.k_parts();
  const int64_t groups = ceil_div(ceil_div(n, kBlockRows), int64_t{cut.row_warps});
  const auto steps_time = [&](int64_t count, double warps) {
    return static_cast<double>(count) * kStepBytes / std::min(warp_rate, kMemoryRate / warps);
  };
  // First all warps are busy, then those alone whose part of K is a step longer. The warp that adds
  // up a block's sums does so beside its own steps.
  const auto turn_time = [&](int64_t busy_clusters) {
    const auto warps = static_cast<double>(busy_clusters * cut.slices * kByteWeightDirectWarps);
    const int64_t longer = steps % parts;
    double time = steps_time(steps / parts, warps);
    if (longer > 0) time += steps_time(1, warps * static_cast<double>(longer) / parts);
    return kTurn + std::max(time, steps_time(ceil_div(steps, parts), 1) + kExchange +
                                      kExchangeTile * static_cast<double>(parts * tiles));
  };
  const int64_t last = groups % clusters;
  return kLaunch + static_cast<double>(groups / clusters) * turn_time(clusters) +
         (last > 0 ? turn_time(last) : 0.0) + static_cast<double>(m * cut.x_row_bytes(k)) / kXRate;
}

// As measured on an H100. A warp brings them into L2 by lines, and loads none before it has asked
// for all: the less a CTA reads in all, the fewer.
int prefetch_steps(int64_t cta_bytes) { return cta_bytes < 256 * 1024 ? 2 : 4; }

}  // namespace

int ByteWeightDirectCut::x_row_bytes(int64_t k) const {
  const int64_t steps = ceil_div<int64_t>(k, kByteWeightDirectStepK);
  const int64_t most = std::min(steps, ceil_div<int64_t>(steps, k_parts()) * k_warps());
  return static_cast<int>(most) * kByteWeightDirectStepK * 2 + 16;
}

int64_t ByteWeightDirectCut::smem_bytes(int64_t tokens, int64_t k) const {
  return kByteWeightDirectBarrierBytes + 2 * int64_t{inbox_bytes(tokens)} + tokens * x_row_bytes(k);
}

bool takes_byte_weight_gemm_direct(const Fp8GemmParams& params) {
  const auto is_aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return params.m > 0 && params.m <= max_byte_weight_direct_tokens(params.grouped()) &&
         params.k > 0 && params.k % 16 == 0 && params.stride_weight_n % 16 == 0 &&
         is_aligned(params.x) && is_aligned(params.weight);
}

std::optional<ByteWeightDirectPlan> plan_byte_weight_gemm_direct(
    int64_t m, int64_t n, int64_t k, const ByteWeightDirectResidency& residency) {
  const int64_t steps = ceil_div<int64_t>(k, kByteWeightDirectStepK);
  const int64_t blocks = ceil_div(n, kBlockRows);
  std::optional<ByteWeightDirectPlan> best;
  double best_time = 0;
  // What a cut of more slices has to save: the model errs by as much.
  constexpr double kSlicesGain = 0.02;
  // st.async wants a cluster; one of a single CTA is none.
  for (int slices = 2; slices <= kMaxClusterCtas; ++slices) {
    const int64_t resident = residency[static_cast<size_t>(slices - 1)];
    for (int row_warps = 1; row_warps <= kByteWeightDirectWarps; row_warps *= 2) {
      const ByteWeightDirectCut cut{slices, row_warps};
      if (resident == 0 || steps < cut.k_parts() || cut.smem_bytes(m, k) > kMaxSmemBytes) continue;
      const int64_t clusters = std::min(ceil_div<int64_t>(blocks, row_warps), resident);
      const double time = launch_time(cut, clusters, m, n, k);
      const double gain = best && slices > best->cut.slices ? kSlicesGain : 0;
      if (best && time >= best_time * (1 - gain)) continue;
      best_time = time;
      best = {cut, static_cast<int>(clusters), prefetch_steps(n * k / (clusters * slices))};
    }
  }
  return best;
}

}  // namespace effllm
