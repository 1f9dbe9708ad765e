// How work is cut for byte_gemm_direct_sm90.cuh: host code alone.
#include <algorithm>

#include "common/math.h"
#include "gemm/byte_gemm_direct_sm90.h"

namespace effllm {
namespace {

constexpr int64_t kBlockRows = 16, kMaxSmemBytes = 227 * 1024;
constexpr int64_t kMaxPartSteps = 1 << (kByteGemmDirectXChunks - 1);

// Nanoseconds that a launch takes on an H100, fitted to measurements: over the cuts of 24 problems
// it chooses one that takes 1 % longer than the best on average, 6.5 % at most.
double launch_time(const ByteGemmDirectCut& cut, int64_t clusters, int64_t m, int64_t n,
                   int64_t k) {
  constexpr double kStepBytes = kBlockRows * kByteGemmDirectStepK;
  constexpr double kMemoryRate = 3020, kXRate = 42.5;  // bytes a nanosecond; the latter of a CTA
  constexpr double kLaunch = 2950, kTurn = 35, kExchange = 1020, kExchangeTile = 5.7;
  // As long as memory keeps up, a warp gets its steps at a rate of its own.
  const int tiles = m <= 8 ? 1 : 2;
  const double warp_rate = tiles == 1 ? 3.7 : 2.4;
  const int64_t steps = ceil_div<int64_t>(k, kByteGemmDirectStepK), parts = cut.k_parts();
  const int64_t groups = ceil_div(ceil_div(n, kBlockRows), int64_t{cut.row_warps});
  const auto steps_time = [&](int64_t count, double warps) {
    return static_cast<double>(count) * kStepBytes / std::min(warp_rate, kMemoryRate / warps);
  };
  // First all warps are busy, then those alone whose part of K is a step longer. The warp that adds
  // up a block's sums does so beside its own steps.
  const auto turn_time = [&](int64_t busy_clusters) {
    const auto warps = static_cast<double>(busy_clusters * cut.slices * kByteGemmDirectWarps);
    const int64_t longer = steps % parts;
    double time = steps_time(steps / parts, warps);
    if (longer > 0) time += steps_time(1, warps * static_cast<double>(longer) / parts);
    return kTurn + std::max(time, steps_time(ceil_div(steps, parts), 1) + kExchange +
                                      kExchangeTile * static_cast<double>(parts * tiles));
  };
  const int64_t last = groups % clusters;
  return kLaunch + static_cast<double>(groups / clusters) * turn_time(clusters) +
         (last > 0 ? turn_time(last) : 0.0) + cut.x_bytes(m, k) / kXRate;
}

// Steps that L2 asks memory for ahead of a warp's loads, as measured on an H100. At first they
// compete with what the warp waits for: the less a CTA reads in all, the fewer.
int prefetch_steps(int64_t cta_bytes) {
  constexpr int64_t kKilobyte = 1024;
  return cta_bytes < 256 * kKilobyte ? 2 : cta_bytes < 1024 * kKilobyte ? 4 : 8;
}

}  // namespace

int ByteGemmDirectCut::x_bytes(int64_t tokens, int64_t k) const {
  const int64_t steps = ceil_div<int64_t>(k, kByteGemmDirectStepK);
  const int64_t most = std::min(steps, ceil_div<int64_t>(steps, k_parts()) * k_warps());
  return static_cast<int>(most) * 2 * x_rows(tokens) * kByteGemmDirectPanelBytes;
}

int64_t ByteGemmDirectCut::smem_bytes(int64_t tokens, int64_t k) const {
  return kByteGemmDirectBarrierBytes + x_bytes(tokens, k) + 2 * int64_t{inbox_bytes(tokens)};
}

bool takes_byte_gemm_direct(const Fp8GemmParams& params) {
  const auto is_aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return params.m > 0 && params.m <= kByteGemmDirectTokens && params.k > 0 && params.k % 16 == 0 &&
         params.stride_weight_n % 16 == 0 && is_aligned(params.x) && is_aligned(params.weight);
}

std::optional<ByteGemmDirectPlan> plan_byte_gemm_direct(int64_t m, int64_t n, int64_t k,
                                                        const ByteGemmDirectResidency& residency) {
  const int64_t steps = ceil_div<int64_t>(k, kByteGemmDirectStepK);
  const int64_t blocks = ceil_div(n, kBlockRows);
  std::optional<ByteGemmDirectPlan> best;
  double best_time = 0;
  // st.async wants a cluster; one of a single CTA is none.
  for (int slices = 2; slices <= kMaxClusterCtas; ++slices) {
    const int64_t resident = residency[static_cast<size_t>(slices - 1)];
    for (int row_warps = 1; row_warps <= kByteGemmDirectWarps; row_warps *= 2) {
      const ByteGemmDirectCut cut{slices, row_warps};
      if (resident == 0 || steps < cut.k_parts() ||
          ceil_div<int64_t>(steps, cut.k_parts()) > kMaxPartSteps ||
          cut.smem_bytes(m, k) > kMaxSmemBytes) {
        continue;
      }
      const int64_t clusters = std::min(ceil_div<int64_t>(blocks, row_warps), resident);
      const double time = launch_time(cut, clusters, m, n, k);
      if (best && time >= best_time) continue;
      best_time = time;
      best = {cut, static_cast<int>(clusters), prefetch_steps(n * k / (clusters * slices))};
    }
  }
  return best;
}

}  // namespace effllm
