// The host side of byte_weight_gemm_direct_sm90.cuh, for code compiled for any architecture: which
// calls it takes, and how their work is cut.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "cuda/launch.h"
#include "gemm/fp8_gemm.h"

namespace effllm {

// At most. Without groups, tiles of byte_weight_gemm_sm90.cuh multiply more than 8 quicker.
constexpr int max_byte_weight_direct_tokens(bool grouped) { return grouped ? 16 : 8; }

inline constexpr int kByteWeightDirectWarps = 16;   // of a CTA
inline constexpr int kByteWeightDirectStepK = 128;  // columns of a step
inline constexpr int kByteWeightDirectBarrierBytes = 1024;

// Rows of W go to clusters, `row_warps` blocks of 16 at a time. The K of each is cut between the
// cluster's `slices` CTAs, and again between the kByteWeightDirectWarps / row_warps warps that a
// CTA has for a block.
struct ByteWeightDirectCut {
  int slices, row_warps;

  constexpr int k_warps() const { return kByteWeightDirectWarps / row_warps; }
  constexpr int k_parts() const { return slices * k_warps(); }
  // Blocks of a turn whose sums a CTA receives.
  constexpr int own_blocks() const { return (row_warps + slices - 1) / slices; }

  // Of a token's columns of x that a CTA needs, at most: 16 bytes off a multiple of 128, so that 8
  // tokens' take all banks.
  int x_row_bytes(int64_t k) const;
  // Of the sums that a CTA receives in one turn.
  constexpr int inbox_bytes(int64_t tokens) const {
    constexpr int kTileBytes = 16 * 8 * 4;
    return own_blocks() * k_parts() * (tokens <= 8 ? 1 : 2) * kTileBytes;
  }
  int64_t smem_bytes(int64_t tokens, int64_t k) const;
};

struct ByteWeightDirectPlan {
  ByteWeightDirectCut cut;
  int clusters;
  int prefetch_steps;  // of each warp, that it brings into L2 before it may load any
};

// [slices - 1]: clusters of so many CTAs, one per multiprocessor, that run on a device at the same
// time.
using ByteWeightDirectResidency = std::array<int, kMaxClusterCtas>;

// 16-bit x and weights of a byte, for few tokens, in rows that can be read 16 bytes at a time.
bool takes_byte_weight_gemm_direct(const Fp8GemmParams& params);

// Nothing if K is too short to be cut, or x too large for the shared memory of a cluster.
std::optional<ByteWeightDirectPlan> plan_byte_weight_gemm_direct(
    int64_t m, int64_t n, int64_t k, const ByteWeightDirectResidency& residency);

// Launch the kernel if it takes these arguments.
bool launch_int8_weight_gemm_direct_sm90(const Fp8GemmParams& params, int device,
                                         cudaStream_t stream);
bool launch_fp8_weight_gemm_direct_sm90(const Fp8GemmParams& params, int device,
                                        cudaStream_t stream);

}  // namespace effllm
