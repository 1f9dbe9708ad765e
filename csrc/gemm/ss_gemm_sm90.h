// The host side of ss_gemm_sm90.cuh, for code compiled for any architecture.
#pragma once

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

  // Whether a cluster may share a tile's K, and float32 go out. Large tiles have no registers left
  // for that.
  constexpr bool splits() const { return row_blocks * cols <= 128; }
};

// How a GEMM is cut: CTAs at the same time, and how many of a cluster share the K of each tile that
// is left when all CTAs have had equally many.
struct SsGemmPlan {
  int ctas, slices;
};

}  // namespace effllm
