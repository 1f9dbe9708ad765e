// The host side of ss_gemm_sm90.cuh, for code compiled for any architecture.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "common/dtype.h"
#include "cuda/launch.h"

namespace effllm {

// A CTA's tile is rows() by `cols`. Rows are W's and columns tokens, or, with `token_rows`, the
// other way round. `neighbours` CTAs of a cluster have the same columns; of them `out_cols` are
// stored in one turn.
struct SsGemmShape {
  int cols, row_blocks, stages, ctas_per_sm, neighbours, out_cols;
  bool token_rows;

  constexpr int rows() const { return 128 * row_blocks; }
  constexpr int tokens() const { return token_rows ? rows() : cols; }
  constexpr int features() const { return token_rows ? cols : rows(); }

  // Whether a cluster may share a tile's K, and float32 go out. Of large tiles with tokens for rows
  // that is slow: a warp would store 16 bytes a token. Neighbours would write into a ring in which
  // there are sums.
  constexpr bool splits() const {
    return neighbours == 1 && row_blocks * cols <= (token_rows ? 128 : 256);
  }
};

// How a GEMM is cut: CTAs at the same time, and how many of a cluster share the K of each tile that
// is left when all CTAs have had equally many.
struct SsGemmPlan {
  int ctas, slices;
};

// [slices - 1]: clusters of so many slices that run on a device at the same time; beyond 1, none of
// a kernel that does not split tiles.
using SsGemmResidency = std::array<int, kMaxClusterCtas>;

// Of the current device and a kernel over tiles C.
template <class C, class Params>
SsGemmResidency tile_gemm_residency(const char* op, void (*kernel)(Params)) {
  SsGemmResidency clusters{};
  const int max_slices = C::kSplits ? kMaxClusterCtas / C::kNeighbours : 1;
  for (int slices = 1; slices <= max_slices; ++slices) {
    clusters[static_cast<size_t>(slices - 1)] =
        max_resident_clusters(op, kernel, C::kThreads, C::kSmemBytes, slices * C::kNeighbours);
  }
  return clusters;
}

// What CTAs need first, and can ask for beside the kernel ahead.
template <class C>
inline constexpr int kPrefetchBytes = (C::kCtasPerSm > 1 ? 128 : 64) * 1024;

// A shape that a GEMM of 8-bit operands may take, and in how many nanoseconds it multiplies a stage
// of K on an H100, as the model of ss_gemm_sm90.cu has it; 0 if it may not.
struct SsGemmCandidate {
  SsGemmShape tile;
  int stage_time;
  SsGemmResidency residency;
};

struct SsGemmProblem {
  int64_t m, n, k;
  DType out_dtype;
  int weight_bits = 8;
  double sum_time = 0.212;  // nanoseconds for each sum of a split tile, of that model
};

struct SsGemmChoice {
  size_t shape;  // of the candidates
  SsGemmPlan cut;
};

SsGemmChoice plan_ss_gemm(const SsGemmProblem& problem, std::span<const SsGemmCandidate> candidates,
                          int num_sms);

// Whether TMA can read and write the rows of x, W and out, of 8-bit operands.
template <class Params>
bool takes_8bit_ss_gemm(const Params& params) {
  constexpr int64_t kAlignment = 16;  // bytes
  const auto is_aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
  };
  const int64_t out_row = params.n * element_bytes(params.out_dtype);
  return params.k > 0 && params.k % kAlignment == 0 && is_aligned(params.x) &&
         params.stride_weight_n % kAlignment == 0 && is_aligned(params.weight) &&
         out_row % kAlignment == 0 && is_aligned(params.out);
}

}  // namespace effllm
