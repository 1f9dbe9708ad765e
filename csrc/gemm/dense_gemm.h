// dense_gemm: out = x @ W^T + bias with weights that are not quantised. What a GEMM over quantised
// weights is measured against, on the same tiles, ring and epilogue (ss_gemm_sm90.cuh).
//
//   x       [..., K]  fp16 or bf16 (fp32 on the CPU only)
//   weight  [N, K]    dtype of x; rows may be strided
//   bias    [N]       any float dtype, any stride
//   out     [..., N]  dtype of x, contiguous
//
// Products and sums are fp32, the result is rounded once. The GPU must be sm_90, N and K multiples
// of 8 and rows of the weight 16-byte aligned: TMA reads and writes nothing else.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/math.h"
#include "common/view.h"

namespace effllm {

struct DenseGemmParams {
  int64_t m, n, k;
  DType dtype;    // of x, weight and out
  const void* x;  // [M, K], contiguous
  const void* weight;
  int64_t stride_weight_n;
  const void* bias;  // may be null
  DType bias_dtype;
  int64_t stride_bias;
  void* out;  // [M, N], contiguous
};

// Everything but `out`; x must be contiguous.
inline DenseGemmParams check_dense_gemm(const View& x, const View& weight,
                                        const std::optional<View>& bias) {
  Check check("dense_gemm");
  Sym n("N"), k("K");
  check(x).last_dim(k);
  if (x.device.type == Device::Type::kCPU) {
    check(x).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  } else {
    check(x).dtype({DType::kFloat16, DType::kBFloat16});
  }
  check(weight).dtype({x.dtype}).shape({n, k}).last_stride_one();
  if (bias) {
    check(*bias).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32}).shape({n});
  }

  DenseGemmParams params{};
  params.m = 1;
  for (int dim = 0; dim + 1 < x.rank; ++dim) params.m *= x.size(dim);
  params.n = *n;
  params.k = *k;
  params.dtype = x.dtype;
  params.x = x.data;
  params.weight = weight.data;
  params.stride_weight_n = weight.stride(0);
  if (bias) {
    params.bias = bias->data;
    params.bias_dtype = bias->dtype;
    params.stride_bias = bias->stride(0);
  }
  return params;
}

// Tiles of the Hopper kernel. A cluster is two CTAs, for 2 * `rows` rows of W and the same tokens.
struct DenseGemmTile {
  int tokens, rows, stages;
  // Of a tile of 64 columns of K, in nanoseconds: what 8192^3 took on an H100 (80 GB HBM3), over
  // its rounds and tiles of K.
  int time;
};

inline constexpr int kDenseGemmCluster = 2;
inline constexpr std::array<DenseGemmTile, 2> kDenseGemmTiles{{
    {256, 128, 3, 750},
    {128, 128, 5, 500},
}};

// `clusters`: that run at the same time.
inline size_t select_dense_gemm_tile(int64_t m, int64_t n, int64_t clusters) {
  size_t best = 0;
  int64_t best_time = INT64_MAX;
  for (size_t index = 0; index < kDenseGemmTiles.size(); ++index) {
    const DenseGemmTile& tile = kDenseGemmTiles[index];
    const int64_t tiles = ceil_div<int64_t>(m, tile.tokens) *
                          ceil_div<int64_t>(n, int64_t{kDenseGemmCluster} * tile.rows);
    const int64_t time = ceil_div(tiles, clusters) * tile.time;
    if (time < best_time) best = index, best_time = time;
  }
  return best;
}

}  // namespace effllm
