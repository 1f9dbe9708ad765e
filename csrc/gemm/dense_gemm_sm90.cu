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

template <class InT, size_t kIndex>
using TileGemm = SsGemm<InT, kDenseGemmTiles[kIndex].tokens, kDenseGemmTiles[kIndex].rows / 128,
                        kDenseGemmTiles[kIndex].stages, kDenseGemmCluster, 128>;

// The fewest that any of the tiles has at the same time.
template <size_t... kIndices>
int resident_clusters(std::index_sequence<kIndices...>) {
  return std::min(
      {max_resident_clusters(kOp, ss_gemm_kernel<TileGemm<bfloat16, kIndices>, DenseGemmParams>,
                             TileGemm<bfloat16, kIndices>::kThreads,
                             TileGemm<bfloat16, kIndices>::kSmemBytes, kDenseGemmCluster)...});
}

template <class InT, size_t... kIndices>
void launch(const DenseGemmParams& params, size_t index, int clusters, cudaStream_t stream,
            std::index_sequence<kIndices...>) {
  ((kIndices == index ? launch_ss_gemm<TileGemm<InT, kIndices>>(kOp, params, clusters, stream)
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
