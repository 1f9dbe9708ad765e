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

// Initialised at run time: GCC calls a function for that, as it sees the kernel's declaration alone.
volatile uint8_t poison = 0xff;
alignas(1024) thread_local uint8_t dynamic_smem[228 * 1024] = {poison};

namespace {

template <int kGroupUnits, bool kHasZeros, const auto& kShapes, size_t... kIndices>
void launch_tiles(const W4A8GemmParams& params, int cols, SsGemmPlan plan,
                  std::index_sequence<kIndices...>) {
  ((kShapes[kIndices].tile.cols == cols
        ? launch_w4a8_tiles<W4A8Gemm<kGroupUnits, kHasZeros, kShapes[kIndices].tile>>(params, plan,
                                                                                      nullptr)
        : void()),
   ...);
}

template <int kGroupUnits, const auto& kShapes>
void launch_tiles(const W4A8GemmParams& params, int cols, SsGemmPlan plan) {
  constexpr std::make_index_sequence<kShapes.size()> kIndices;
  if (params.zeros != nullptr) {
    launch_tiles<kGroupUnits, true, kShapes>(params, cols, plan, kIndices);
  } else {
    launch_tiles<kGroupUnits, false, kShapes>(params, cols, plan, kIndices);
  }
}

// `cols`: of a tile of the Hopper kernel, on so many CTAs; 0: the other kernel.
void launch(const W4A8GemmParams& params, int cols, int ctas) {
  const SsGemmPlan plan{ctas, 1};
  std::fill(dynamic_smem, dynamic_smem + sizeof(dynamic_smem), poison);
  if (cols == 0) {
    launch_w4a8_gemm_sm80("w4a8_gemm", params, nullptr);
  } else if (!takes_w4a8_gemm_sm90(params)) {
    fail("w4a8_gemm", "Hopper's kernel does not take it");
  } else if (params.num_groups == 1) {
    launch_tiles<0, kW4A8ChannelShapes>(params, cols, plan);
  } else if (params.group_size == 64) {
    launch_tiles<1, kW4A8GroupShapes>(params, cols, plan);
  } else {
    launch_tiles<2, kW4A8GroupShapes>(params, cols, plan);
  }
}

}  // namespace
}  // namespace effllm

// The tensors in the order of the schema, and out.
extern "C" int w4a8_gemm(const TensorArgument* tensors, int64_t group_size, int cols, int ctas) {
  const auto view = [&](int idx) { return tensors[idx].view(); };
  const effllm::View out = *view(6);
  try {
    effllm::W4A8GemmParams params =
        effllm::check_w4a8_gemm(*view(0), {*view(1), *view(1)}, *view(2), *view(3), view(4),
                                view(5), group_size, out.dtype);
    params.out = out.data;
    effllm::launch(params, cols, ctas);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}
