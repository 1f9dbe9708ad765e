// The host side of w4a8_gemm_sm90.cuh: tile shapes, and how work is cut into them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "cuda/tensor_map.h"
#include "gemm/ss_gemm_sm90.h"
#include "gemm/w4a8_gemm_sm90.cuh"

namespace effllm {

inline constexpr const char* kW4A8Op = "w4a8_gemm";

template <class C>
void launch_w4a8_tiles(const W4A8GemmParams& params, SsGemmPlan plan, cudaStream_t stream) {
  W4A8GemmArgs args{params, {}, {}, {}, kPrefetchBytes<C> / (C::kStrips * C::kStripBytes)};
  args.x_map =
      make_tensor_map(params.x, params.dtype, params.m, params.k, params.k, C::kCols, kW4A8Op);
  TileSchedule& schedule = args.schedule;
  schedule.row_tiles = static_cast<int>(ceil_div<int64_t>(params.n, C::kRows));
  schedule.col_tiles = static_cast<int>(ceil_div<int64_t>(params.m, C::kCols));
  schedule.k_tiles = static_cast<int>(ceil_div<int64_t>(params.k, C::kTileK));
  schedule.slices = plan.slices;
  const int tiles = schedule.row_tiles * schedule.col_tiles;
  if (params.out_dtype == DType::kFloat32) {  // store_tile rounds to 16 bits
    schedule.whole_tiles = 0;
  } else {
    args.out_map = make_tensor_map(params.out, params.out_dtype, params.m, params.n, params.n,
                                   C::kOutCols, kW4A8Op);
    schedule.whole_tiles = plan.slices == 1 ? tiles : tiles / plan.ctas * plan.ctas;
  }
  Launch{kW4A8Op,
         dim3(static_cast<unsigned>(std::min(plan.ctas, tiles * plan.slices))),
         dim3(C::kThreads),
         static_cast<size_t>(C::kSmemBytes),
         stream,
         plan.slices,
         true}(w4a8_gemm_kernel<C>, args);
}

struct W4A8GemmShape {
  SsGemmShape tile;
  int stage_time;  // of an SsGemmCandidate
};

// For up to 64 tokens, a CTA of a deep ring on each multiprocessor was faster than two of half its
// stages in all measured cells. Times are fitted as told in ss_gemm_sm90.cu: with a scale a row
// choices are 0.5 % slower than the best plans, the worst one 12 %; with multipliers of 128
// columns, from 96 tokens on, 0.8 and 15 %.
inline constexpr std::array<W4A8GemmShape, 5> kW4A8Shapes{{
    {{16, 1, 18, 1, 1, 16, false}, 170},
    {{32, 1, 15, 1, 1, 32, false}, 250},
    {{64, 1, 11, 1, 1, 64, false}, 296},
    {{128, 1, 7, 1, 1, 128, false}, 300},
    {{256, 1, 4, 1, 1, 128, false}, 660},
}};
// With scales of groups. Fitted in the same way, to groups of 128 columns: choices are 0.6 % slower
// than the best plans, the worst one 12 %. Groups of 64 columns are not fitted.
inline constexpr std::array<W4A8GemmShape, 5> kW4A8GroupShapes{{
    {{16, 1, 17, 1, 1, 16, false}, 170},
    {{32, 1, 14, 1, 1, 32, false}, 250},
    {{64, 1, 12, 1, 1, 64, false}, 292},
    {{128, 1, 7, 1, 1, 128, false}, 276},
    {{256, 1, 4, 1, 1, 128, false}, 620},
}};

// The kernels of one way to scale.
template <int kGroupSteps, W4A8Decoding kDecoding>
class W4A8Kernels {
 public:
  static void launch(const W4A8GemmParams& params, int device, cudaStream_t stream) {
    static PerDevice<Residency> known;
    const Residency residency = known.get(device, [] { return find_residency(kIndices); });
    std::array<SsGemmCandidate, kShapes.size()> candidates;
    for (size_t index = 0; index < candidates.size(); ++index) {
      candidates[index] = {kShapes[index].tile, kShapes[index].stage_time, residency[index]};
    }
    const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device, kW4A8Op);
    const SsGemmProblem problem{params.m, params.n, params.k, params.out_dtype, 4, 0.15};
    launch(params, plan_ss_gemm(problem, candidates, num_sms), stream, kIndices);
  }

 private:
  static constexpr bool kGrouped = kGroupSteps > 0 && kDecoding != W4A8Decoding::kMultipliers;
  static constexpr auto& kShapes = kGrouped ? kW4A8GroupShapes : kW4A8Shapes;
  static constexpr std::make_index_sequence<kShapes.size()> kIndices{};
  using Residency = std::array<SsGemmResidency, kShapes.size()>;
  template <size_t kShape>
  using TileGemm = W4A8Gemm<kGroupSteps, kDecoding, kShapes[kShape].tile>;

  template <size_t... kShape>
  static Residency find_residency(std::index_sequence<kShape...>) {
    return {tile_gemm_residency<TileGemm<kShape>>(kW4A8Op, w4a8_gemm_kernel<TileGemm<kShape>>)...};
  }

  template <size_t... kShape>
  static void launch(const W4A8GemmParams& params, const SsGemmChoice& choice, cudaStream_t stream,
                     std::index_sequence<kShape...>) {
    ((kShape == choice.shape ? launch_w4a8_tiles<TileGemm<kShape>>(params, choice.cut, stream)
                             : void()),
     ...);
  }
};

template <int kGroupSteps>
void launch_w4a8_gemm(const W4A8GemmParams& params, int device, cudaStream_t stream) {
  if (params.zeros != nullptr) {
    W4A8Kernels<kGroupSteps, W4A8Decoding::kZeros>::launch(params, device, stream);
  } else {
    W4A8Kernels<kGroupSteps, W4A8Decoding::kMiddle>::launch(params, device, stream);
  }
}

}  // namespace effllm
