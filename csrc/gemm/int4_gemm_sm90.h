// int4_gemm on wgmma: the host side, for code compiled for any architecture. Two kernels:
//
//   narrow  up to 32 tokens: many small CTAs, each a slice of a strip of W; bound by bytes
//   wide    more: a persistent kernel over large tiles; bound by the tensor cores
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "cuda/launch.h"
#include "gemm/int4_gemm.h"

namespace effllm {

// Launches one of them if it takes these arguments. Not taken: groups of 32, and rows of x that TMA
// cannot read.
bool launch_int4_gemm_sm90(const Int4GemmParams& params, int device, cudaStream_t stream);

inline constexpr int kInt4GemmNarrowTokens = 32;  // the most that the narrow kernel is meant for

// Tokens of a CTA, and how many CTAs of a cluster share the work along K.
struct Int4GemmNarrowPlan {
  int tokens, k_slices;
};

std::optional<Int4GemmNarrowPlan> plan_int4_gemm_narrow(const Int4GemmParams& params, int num_sms);
void launch_int4_gemm_narrow_sm90(const Int4GemmParams& params, Int4GemmNarrowPlan plan,
                                  cudaStream_t stream);

// A CTA's tile, the stages of its ring, and how many of it share a multiprocessor.
struct Int4GemmWideShape {
  int tokens, row_blocks, stages, ctas_per_sm;

  // Of a tile of 64 columns of K, in nanoseconds on an H100: with the multiprocessor to itself, and
  // where all CTAs of one compute.
  int lone_tile, shared_tile;

  constexpr int strips() const { return 2 * row_blocks; }
  constexpr int rows() const { return 64 * strips(); }
};

inline constexpr std::array<Int4GemmWideShape, 4> kInt4GemmWideShapes{{
    {64, 1, 5, 2, 340, 600},
    {128, 1, 8, 1, 410, 410},
    {128, 2, 5, 1, 750, 750},
    {256, 1, 4, 1, 660, 660},
}};

// [shape][slices - 1]: clusters of so many CTAs that run on the current device at the same time.
using Int4GemmResidency = std::array<std::array<int, kMaxClusterCtas>, kInt4GemmWideShapes.size()>;
Int4GemmResidency int4_gemm_wide_residency();

struct Int4GemmWidePlan {
  size_t shape;
  int k_slices, ctas;
};

Int4GemmWidePlan plan_int4_gemm_wide(int64_t m, int64_t n, int64_t k, int num_sms,
                                     const Int4GemmResidency& residency);
void launch_int4_gemm_wide_sm90(const Int4GemmParams& params, const Int4GemmWidePlan& plan,
                                cudaStream_t stream);

}  // namespace effllm
