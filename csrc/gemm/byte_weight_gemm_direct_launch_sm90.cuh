// Launches of byte_weight_gemm_direct_sm90.cuh, over how an op's weights are decoded.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "gemm/byte_weight_gemm_direct_sm90.cuh"

namespace effllm {

template <class C>
void launch_byte_weight_gemm_direct(const char* op, const Fp8GemmParams& params,
                                    const ByteWeightDirectPlan& plan, cudaStream_t stream) {
  // More than half of a multiprocessor's: of two launches at the same time, each has one CTA on
  // every multiprocessor or waits. Two CTAs of one launch on some would make the others idle.
  constexpr int64_t kMinSmemBytes = 116 * 1024;
  const ByteWeightDirectCut& cut = plan.cut;
  const auto steps = static_cast<int>(ceil_div<int64_t>(params.k, C::kStepK));
  const auto blocks = static_cast<int>(ceil_div<int64_t>(params.n, C::kBlockRows));
  const ByteWeightDirectArgs args{params,
                                  cut,
                                  ceil_div(blocks, cut.row_warps),
                                  steps / cut.k_parts(),
                                  steps % cut.k_parts(),
                                  cut.x_row_bytes(params.k),
                                  cut.inbox_bytes(params.m),
                                  plan.prefetch_steps};
  const Launch launch{
      op,
      dim3(static_cast<unsigned>(plan.clusters * cut.slices)),
      dim3(C::kThreads),
      static_cast<size_t>(std::max(cut.smem_bytes(params.m, params.k), kMinSmemBytes)),
      stream,
      cut.slices,
      true};
  launch(byte_weight_gemm_direct_kernel<C>, args);
}

// Of the current device. Registers and threads are those of any of the kernels, and shared memory
// is more than half of a multiprocessor's.
template <class C>
ByteWeightDirectResidency byte_weight_gemm_direct_residency(const char* op) {
  constexpr int kSmemBytes = 200 * 1024;
  ByteWeightDirectResidency clusters;
  for (int slices = 1; slices <= kMaxClusterCtas; ++slices) {
    clusters[static_cast<size_t>(slices - 1)] = max_resident_clusters(
        op, byte_weight_gemm_direct_kernel<C>, C::kThreads, kSmemBytes, slices);
  }
  return clusters;
}

// Launches the kernel for these arguments if there is one.
template <template <class> class Dequant>
bool launch_byte_weight_gemm_direct(const char* op, const Fp8GemmParams& params, int device,
                                    cudaStream_t stream) {
  if (!takes_byte_weight_gemm_direct(params)) return false;
  static PerDevice<ByteWeightDirectResidency> known;
  const ByteWeightDirectResidency residency = known.get(device, [op] {
    return byte_weight_gemm_direct_residency<ByteWeightDirect<bfloat16, Dequant, 2, true>>(op);
  });
  const auto plan = plan_byte_weight_gemm_direct(params.m, params.n, params.k, residency);
  if (!plan) return false;
  dispatch_16bit(params.dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto tiles, auto grouped) {
      launch_byte_weight_gemm_direct<ByteWeightDirect<T, Dequant, tiles, grouped>>(op, params,
                                                                                   *plan, stream);
    };
    constexpr std::integral_constant<int, 1> kOneTile;
    constexpr std::integral_constant<int, 2> kTwoTiles;
    if (params.m <= 8) {
      params.grouped() ? launch(kOneTile, std::true_type()) : launch(kOneTile, std::false_type());
    } else {
      launch(kTwoTiles, std::true_type());
    }
  });
  return true;
}

}  // namespace effllm
