// Which output tiles a CTA of a persistent GEMM computes, and in what order. Rows are those of the
// A operand of wgmma, columns those of its B operand: one are W's, the other tokens.
//
//   tiles 0 .. whole_tiles - 1   one CTA each, all of K; CTA b takes b, b + grid, ...
//   the rest                     a cluster each: its CTAs, the "slices", share the work along K
//
// A last round that would leave most multiprocessors idle is thus cut finer; a problem of few tiles
// consists of such a round alone.
#pragma once

#include "common/math.h"

namespace effllm {

struct TileIdx {
  int row, col;
};

// The tile-th of all. A group of so many columns of tiles runs together: their x and W then meet in
// L2.
__device__ __forceinline__ TileIdx grouped_tile(int tile, int row_tiles, int col_tiles) {
  constexpr int kGroupCols = 8;
  const int group = tile / (kGroupCols * row_tiles) * kGroupCols;
  const int group_size = min(kGroupCols, col_tiles - group);
  const int in_group = tile - group * row_tiles;
  return {in_group / group_size, group + in_group % group_size};
}

struct TileSchedule {
  struct Work {
    int row_tile, col_tile;
    int first_k_tile, num_k_tiles;  // at least one: there are no more slices than tiles of K
    bool split;
  };

  int row_tiles, col_tiles, k_tiles;
  int whole_tiles;  // a multiple of the grid, or all
  int slices;       // of K; CTAs of a cluster

  // Of this CTA, its `item`-th piece of work; false when there is none. Neighbours in a cluster
  // work on rows of tiles next to each other, of the same columns and slice; counts are of such
  // groups.
  template <int kNeighbours = 1>
  __device__ __forceinline__ bool get(int item, Work& work) const {
    const int grid = static_cast<int>(gridDim.x) / kNeighbours;
    const int cta = static_cast<int>(blockIdx.x) / kNeighbours;
    const int rounds = ceil_div(whole_tiles, grid);
    int tile;
    if (item < rounds) {
      tile = item * grid + cta;
      if (tile >= whole_tiles) return false;
      work = {0, 0, 0, k_tiles, false};
    } else {
      tile = whole_tiles + (item - rounds) * (grid / slices) + cta / slices;
      if (tile >= row_tiles * col_tiles) return false;
      const int first = slice_begin(cta % slices);
      work = {0, 0, first, slice_begin(cta % slices + 1) - first, true};
    }
    const TileIdx idx = grouped_tile(tile, row_tiles, col_tiles);
    work.row_tile = idx.row * kNeighbours + static_cast<int>(blockIdx.x) % kNeighbours;
    work.col_tile = idx.col;
    return true;
  }

  __device__ __forceinline__ int slice_begin(int slice) const { return k_tiles * slice / slices; }
};

}  // namespace effllm
