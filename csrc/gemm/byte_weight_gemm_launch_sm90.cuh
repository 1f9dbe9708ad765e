// The host side of byte_weight_gemm_sm90.cuh: tile shapes, and how work is cut into them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/dispatch.h"
#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "cuda/tensor_map.h"
#include "gemm/byte_weight_gemm_sm90.cuh"
#include "gemm/byte_weight_gemm_sm90.h"

namespace effllm {

inline constexpr std::array<ByteWeightShape, 5> kByteWeightChannelShapes{{
    {16, 2, 10, 16, 230},
    {32, 2, 8, 32, 230},
    {64, 2, 6, 64, 270},
    {128, 2, 4, 128, 375},
    {256, 1, 4, 256, 615},
}};
// Registers have the sums of all groups, and of one group those of two parts of the tokens.
inline constexpr std::array<ByteWeightShape, 4> kByteWeightGroupShapes{{
    {32, 2, 8, 32, 230},
    {64, 2, 6, 64, 295},
    {128, 2, 4, 64, 450},
    {192, 2, 3, 64, 590},
}};

template <class C>
void launch_byte_weight_tiles(const char* op, const Fp8GemmParams& params,
                              const ByteWeightPlan& plan, cudaStream_t stream) {
  constexpr int kPrefetchBytes = 64 * 1024;
  ByteWeightArgs args{params, {}, {}, {}, {}, kPrefetchBytes / (C::kRows * C::kTileK)};
  args.x_map = make_tensor_map(params.x, params.dtype, params.m, params.k, params.k, C::kCols, op);
  args.weight_map =
      make_tensor_map(params.weight, DType::kInt8, params.n, params.k, params.stride_weight_n,
                      TensorMapBox{C::kTileK, C::kRows, true}, op);
  args.out_map =
      make_tensor_map(params.out, params.dtype, params.m, params.n, params.n, C::kOutCols, op);
  TileSchedule& schedule = args.schedule;
  schedule.row_tiles = static_cast<int>(ceil_div<int64_t>(params.n, C::kRows));
  schedule.col_tiles = static_cast<int>(ceil_div<int64_t>(params.m, C::kCols));
  schedule.k_tiles = static_cast<int>(ceil_div<int64_t>(params.k, C::kTileK));
  schedule.slices = plan.k_slices;
  const int tiles = schedule.row_tiles * schedule.col_tiles;
  const int grid = std::min(plan.ctas, tiles * plan.k_slices);
  schedule.whole_tiles = plan.k_slices == 1 ? tiles : tiles / grid * grid;
  Launch{op,
         dim3(static_cast<unsigned>(grid)),
         dim3(C::kThreads),
         static_cast<size_t>(C::kSmemBytes),
         stream,
         plan.k_slices,
         true}(byte_weight_gemm_kernel<C>, args);
}

// The kernels of one way to scale.
template <template <class> class Dequant, bool kGrouped>
class ByteWeightKernels {
 public:
  static void launch(const char* op, const Fp8GemmParams& params, int device, cudaStream_t stream) {
    static PerDevice<Residency> known;
    const Residency residency = known.get(device, [&] { return find_residency(op, kIndices); });
    const ByteWeightPlan plan =
        plan_byte_weight_gemm(params.m, params.n, params.k, kShapes, residency);
    dispatch_16bit(params.dtype,
                   [&](auto in) { launch<decltype(in)>(op, params, plan, stream, kIndices); });
  }

 private:
  static constexpr auto kShapes = [] {
    if constexpr (kGrouped) {
      return kByteWeightGroupShapes;
    } else {
      return kByteWeightChannelShapes;
    }
  }();
  static constexpr std::make_index_sequence<kShapes.size()> kIndices{};
  using Residency = std::array<ByteWeightResidency, kShapes.size()>;
  template <class InT, size_t kShape>
  using TileGemm = ByteWeightGemm<InT, Dequant, kGrouped, kShapes[kShape]>;

  template <class C>
  static ByteWeightResidency resident_clusters(const char* op) {
    ByteWeightResidency clusters;
    for (int slices = 1; slices <= kMaxClusterCtas; ++slices) {
      clusters[static_cast<size_t>(slices - 1)] =
          max_resident_clusters(op, byte_weight_gemm_kernel<C>, C::kThreads, C::kSmemBytes, slices);
    }
    return clusters;
  }

  // Types of x change neither registers nor shared memory.
  template <size_t... kShape>
  static Residency find_residency(const char* op, std::index_sequence<kShape...>) {
    return {resident_clusters<TileGemm<bfloat16, kShape>>(op)...};
  }

  template <class InT, size_t... kShape>
  static void launch(const char* op, const Fp8GemmParams& params, const ByteWeightPlan& plan,
                     cudaStream_t stream, std::index_sequence<kShape...>) {
    ((kShape == plan.shape
          ? launch_byte_weight_tiles<TileGemm<InT, kShape>>(op, params, plan, stream)
          : void()),
     ...);
  }
};

}  // namespace effllm
