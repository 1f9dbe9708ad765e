// w4a8_gemm's kernels on lanes that take turns; test_w4a8_kernels.py compiles it, and calls it with
// tensors. Those of Hopper have a CTA to a cluster, and their copies and products are done at once.
#include <cuda_runtime.h>

// Shared memory that is declared elsewhere, too: all lanes are of one thread.
#undef __shared__
#define __shared__ thread_local

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <utility>

#include "gemm/w4a8_gemm_launch_sm90.cuh"
#include "gemm/w4a8_gemm_sm80.cuh"
#include "tensor_argument.h"

namespace effllm {

// Initialised at run time: GCC calls a function for that, as it sees the kernel's declaration
// alone.
volatile uint8_t poison = 0xff;
alignas(1024) thread_local uint8_t dynamic_smem[228 * 1024] = {poison};

namespace {

template <int kGroupSteps, W4A8Decoding kDecoding, const auto& kShapes, size_t... kIndices>
void launch_tiles(const W4A8GemmParams& params, int cols, SsGemmPlan plan,
                  std::index_sequence<kIndices...>) {
  ((kShapes[kIndices].tile.cols == cols
        ? launch_w4a8_tiles<W4A8Gemm<kGroupSteps, kDecoding, kShapes[kIndices].tile>>(params, plan,
                                                                                      nullptr)
        : void()),
   ...);
}

template <int kGroupSteps, const auto& kShapes>
void launch_tiles(const W4A8GemmParams& params, int cols, SsGemmPlan plan) {
  constexpr std::make_index_sequence<kShapes.size()> kIndices;
  if (params.zeros != nullptr) {
    launch_tiles<kGroupSteps, W4A8Decoding::kZeros, kShapes>(params, cols, plan, kIndices);
  } else {
    launch_tiles<kGroupSteps, W4A8Decoding::kMiddle, kShapes>(params, cols, plan, kIndices);
  }
}

template <int kGroupSteps>
void launch_multiplying_tiles(const W4A8GemmParams& params, int cols, SsGemmPlan plan) {
  constexpr std::make_index_sequence<kW4A8Shapes.size()> kIndices;
  launch_tiles<kGroupSteps, W4A8Decoding::kMultipliers, kW4A8Shapes>(params, cols, plan, kIndices);
}

// `cols`: of a tile of the Hopper kernel, on so many CTAs; 0: the other kernel.
void launch(const W4A8GemmParams& params, int cols, int ctas) {
  const SsGemmPlan plan{ctas, 1};
  std::fill(dynamic_smem, dynamic_smem + sizeof(dynamic_smem), poison);
  if (cols == 0) {
    launch_w4a8_gemm_sm80("w4a8_gemm", params, nullptr);
  } else if (!takes_w4a8_gemm_sm90(params)) {
    fail("w4a8_gemm", "Hopper's kernel does not take it");
  } else if (params.multipliers.data != nullptr) {
    if (params.multipliers.group_size == 32) {
      launch_multiplying_tiles<1>(params, cols, plan);
    } else if (params.multipliers.group_size == 64) {
      launch_multiplying_tiles<2>(params, cols, plan);
    } else {
      launch_multiplying_tiles<4>(params, cols, plan);
    }
  } else if (params.num_groups == 1) {
    launch_tiles<0, kW4A8Shapes>(params, cols, plan);
  } else if (params.group_size == 64) {
    launch_tiles<2, kW4A8GroupShapes>(params, cols, plan);
  } else {
    launch_tiles<4, kW4A8GroupShapes>(params, cols, plan);
  }
}

// A slice of the K of a tile: what one CTA of a cluster adds up.
struct SliceArgs {
  W4A8GemmArgs gemm;
  TileSchedule::Work work;
  float* sums;  // [tokens, rows] of the tile
};

template <class C>
void slice_kernel(const SliceArgs args) {
  __shared__ uint64_t full[C::kStages], empty[C::kStages];
  const W4A8Shared<C> smem{dynamic_smem, full, empty, nullptr};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], C::kProducers);
      ptx::mbarrier_init(&empty[stage], kMathThreads / 32);
    }
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  Ring<C::kStages> ring;
  if (warp >= kMathThreads / 32) {
    if (warp == kMathThreads / 32 && lane == 0) produce<C>(args.gemm, smem, args.work, ring);
    if constexpr (C::kStageGroups > 0) {
      int wait = warp - kMathThreads / 32 - 1;
      if (wait >= 0) produce_scales<C>(args.gemm, smem, args.work, ring, wait);
    }
    return;
  }
  Accumulators<C> sums = {};
  mainloop<C>(args.gemm, smem, args.work, ring, sums);
  for (int i = 0; i < C::kCols / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    args.sums[token * C::kRows + row] = static_cast<float>(sums[0][i]);
  }
}

template <int kGroupSteps, W4A8Decoding kDecoding, const auto& kShapes>
void run_slice(const W4A8GemmParams& params, const TileSchedule::Work& work, float* sums) {
  using C = W4A8Gemm<kGroupSteps, kDecoding, kShapes[0].tile>;
  SliceArgs args{{params, {}, {}, {}, 0}, work, sums};
  args.gemm.x_map =
      make_tensor_map(params.x, params.dtype, params.m, params.k, params.k, C::kCols, "w4a8_gemm");
  warp::run([&] { slice_kernel<C>(args); }, C::kThreads);
}

W4A8GemmParams params_of(const TensorArgument* tensors, int64_t group_size, DType out_dtype) {
  const auto view = [&](int idx) { return tensors[idx].view(); };
  return check_w4a8_gemm(*view(0), {*view(1), *view(1)}, *view(2), *view(3), view(4), view(5),
                         view(6), group_size, out_dtype);
}

}  // namespace
}  // namespace effllm

// The tensors in the order of the schema, and out.
extern "C" int w4a8_gemm(const TensorArgument* tensors, int64_t group_size, int cols, int ctas) {
  const effllm::View out = *tensors[7].view();
  try {
    effllm::W4A8GemmParams params = effllm::params_of(tensors, group_size, out.dtype);
    params.out = out.data;
    effllm::launch(params, cols, ctas);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}

// The tensors in the order of the schema, with zero points or multipliers (of 64 columns or more),
// and the sums of a tile of 16 tokens by
// 128 rows, over some of its stages of 128 columns.
extern "C" void w4a8_slice(const TensorArgument* tensors, int64_t group_size, int row_tile,
                           int first_k_tile, int num_k_tiles) {
  const effllm::W4A8GemmParams params =
      effllm::params_of(tensors, group_size, effllm::DType::kFloat32);
  const effllm::TileSchedule::Work work{row_tile, 0, first_k_tile, num_k_tiles, true};
  auto* sums = static_cast<float*>(tensors[7].data);
  constexpr auto kZeros = effllm::W4A8Decoding::kZeros;
  constexpr auto kMultipliers = effllm::W4A8Decoding::kMultipliers;
  if (params.multipliers.data != nullptr && params.multipliers.group_size == 64) {
    effllm::run_slice<2, kMultipliers, effllm::kW4A8Shapes>(params, work, sums);
  } else if (params.multipliers.data != nullptr) {
    effllm::run_slice<4, kMultipliers, effllm::kW4A8Shapes>(params, work, sums);
  } else if (params.num_groups == 1) {
    effllm::run_slice<0, kZeros, effllm::kW4A8Shapes>(params, work, sums);
  } else if (group_size == 64) {
    effllm::run_slice<2, kZeros, effllm::kW4A8GroupShapes>(params, work, sums);
  } else {
    effllm::run_slice<4, kZeros, effllm::kW4A8GroupShapes>(params, work, sums);
  }
}
