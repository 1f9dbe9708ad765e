// dense_gemm on wgmma: the plain use of ss_gemm_sm90.cuh, where what bounds it is said.
#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include "cuda/per_device.h"
#include "gemm/dense_gemm_sm90.h"
#include "gemm/ss_gemm_sm90.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "dense_gemm";

template <class InT_>
struct DenseGemm {
  using InT = InT_;
  using Params = DenseGemmParams;
  using Finish = AddBias<Params>;
  static constexpr bool kSplits = false;
  template <class C>
  using Promotion = NoPromotion<C>;
};

constexpr SsGemmShape shape_of(const DenseGemmTile& tile) {
  return {tile.tokens, tile.rows / 128, tile.stages, 1, kDenseGemmCluster, tile.tokens, false};
}

template <class InT, size_t kIndex>
using TileGemm = SsGemm<DenseGemm<InT>, shape_of(kDenseGemmTiles[kIndex])>;

// The fewest that any of the tiles has at the same time.
template <size_t... kIndices>
int resident_clusters(std::index_sequence<kIndices...>) {
  return std::min({max_resident_clusters(
      kOp, ss_gemm_kernel<TileGemm<bfloat16, kIndices>>, TileGemm<bfloat16, kIndices>::kThreads,
      TileGemm<bfloat16, kIndices>::kSmemBytes, kDenseGemmCluster)...});
}

template <class InT, size_t... kIndices>
void launch(const DenseGemmParams& params, size_t index, int clusters, cudaStream_t stream,
            std::index_sequence<kIndices...>) {
  const SsGemmPlan plan{clusters * kDenseGemmCluster, 1};
  ((kIndices == index
        ? launch_ss_gemm<TileGemm<InT, kIndices>>(kOp, params, params.dtype, plan, 0, stream)
        : void()),
   ...);
}

}  // namespace

void launch_dense_gemm_sm90(const DenseGemmParams& params, int device, cudaStream_t stream) {
  constexpr std::make_index_sequence<kDenseGemmTiles.size()> kIndices;
  static PerDevice<int> residency;
  const int clusters = residency.get(device, [&] { return resident_clusters(kIndices); });
  const size_t index = select_dense_gemm_tile(params.m, params.n, clusters);
  if (params.dtype == DType::kFloat16) {
    launch<float16>(params, index, clusters, stream, kIndices);
  } else {
    launch<bfloat16>(params, index, clusters, stream, kIndices);
  }
}

}  // namespace effllm
