// The host side of packed_gemm_narrow_sm90.cuh, for code compiled for any architecture: tile
// shapes, and how work is cut into them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "cuda/launch.h"
#include "gemm/packed_gemm.h"

namespace effllm {

inline constexpr int kPackedGemmNarrowTileK = 64;  // columns of a tile

// A CTA's tile, the stages of its ring, each of an even number of 64-column tiles, and how many
// CTAs share a multiprocessor: as many bytes of codes in flight as they leave room for.
struct PackedGemmNarrowShape {
  int tokens, strips, stage_tiles, stages, ctas_per_sm;

  // Microseconds of a tile of 64 columns on an H100: alone on its multiprocessor, what each other
  // CTA there adds, and where all multiprocessors are busy.
  double lone_tile, other_tile, shared_tile;

  constexpr int rows() const { return 64 * strips; }
  constexpr int stage_bytes() const {
    return stage_tiles * kPackedGemmNarrowTileK * (rows() / 2 + tokens * 2);
  }
};

inline constexpr std::array<PackedGemmNarrowShape, 4> kPackedGemmNarrowShapes{{
    {16, 1, 4, 3, 3, 0.107, 0.015, 0.138},
    {16, 2, 4, 3, 2, 0.182, 0.122, 0.173},
    {32, 1, 4, 3, 2, 0.183, 0.049, 0.028},
    {32, 2, 2, 4, 2, 0.268, 0.124, 0.036},
}};
inline constexpr int kPackedGemmNarrowTokens = 32;  // the most that it is meant for
inline constexpr int64_t kPackedGemmRowGroupBytes = 8;

// How K is cut: whole stages and whole groups per slice. A stage has an even number of tiles, so
// that groups of one or two tiles are whole anyway; a single group has one scale in every slice.
struct PackedGemmNarrowSplit {
  int tiles_per_slice, group_tiles;
  int64_t blocks, smem_bytes;

  PackedGemmNarrowSplit(const PackedGemmParams& params, const PackedGemmNarrowShape& shape,
                        int k_slices);
};

// Which of the shapes, how many CTAs of a cluster share the work along K, what shared memory a CTA
// takes at least, and the microseconds it is thought to take.
struct PackedGemmNarrowPlan {
  size_t shape;
  int k_slices;
  int64_t min_smem_bytes;
  double time;
};

// [slices - 1]: clusters of so many CTAs that run on a device at the same time, two CTAs per
// multiprocessor.
using PackedGemmNarrowResidency = std::array<int, kMaxClusterCtas>;

// Nothing if the scales of a slice do not fit.
std::optional<PackedGemmNarrowPlan> plan_packed_gemm_narrow(
    const PackedGemmParams& params, int num_sms, const PackedGemmNarrowResidency& residency);

}  // namespace effllm
