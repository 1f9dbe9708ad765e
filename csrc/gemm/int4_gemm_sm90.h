// int4_gemm on Hopper: the host side, for code compiled for any architecture. Three kernels:
//
//   direct  up to 8 tokens: codes from memory into registers, mma.sync; bound by bytes
//   narrow  up to 32 tokens, on small layers up to 128: wgmma, many small CTAs, each a slice of a
//           strip of W; bound by bytes
//   wide    more: wgmma, a persistent kernel over large tiles; bound by the tensor cores
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/launch.h"
#include "gemm/int4_gemm.h"
#include "gemm/packed_gemm_narrow_sm90.h"

namespace effllm {

// Launches one of them if it takes these arguments. Not taken: rows of x that TMA cannot read, and,
// for more than 8 tokens, groups of 32 and permuted x.
bool launch_int4_gemm_sm90(const Int4GemmParams& params, int device, cudaStream_t stream);

// Up to 8 tokens. False if it does not take the arguments: K too short, x too large, scales of
// another type.
inline constexpr int kInt4GemmDirectTokens = 8;
bool launch_int4_gemm_direct_sm90(const Int4GemmParams& params, int num_sms, cudaStream_t stream);

inline constexpr int kInt4GemmTileK = kPackedGemmNarrowTileK;  // columns of a wide tile, too

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

// Up to which narrow tiles were measured beside wide ones; where both can do it, more are wide.
inline constexpr int kInt4GemmNarrowTokens = 128;
PackedGemmNarrowResidency int4_gemm_narrow_residency();
void launch_int4_gemm_narrow_sm90(const Int4GemmParams& params, const PackedGemmNarrowPlan& plan,
                                  cudaStream_t stream);

struct Int4GemmWidePlan {
  size_t shape;
  int k_slices, ctas;
  double time;  // microseconds that it is thought to take
};

Int4GemmWidePlan plan_int4_gemm_wide(int64_t m, int64_t n, int64_t k, int num_sms,
                                     const Int4GemmResidency& residency);
void launch_int4_gemm_wide_sm90(const Int4GemmParams& params, const Int4GemmWidePlan& plan,
                                cudaStream_t stream);

}  // namespace effllm
