// int8_gemm on wgmma: int8 operands for the kernel of ss_gemm_sm90.cuh, where what bounds it is
// said. The tensor cores' sums are exact, so that nothing is added up outside, and the slices of a
// tile's K come together in int32.
#include <array>
#include <cstddef>
#include <utility>

#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "gemm/int8_finish.cuh"
#include "gemm/int8_gemm_sm90.h"
#include "gemm/ss_gemm_sm90.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "int8_gemm";

struct Int8Finish {
  using Feature = Int8Feature;
  using Token = Int8Token;

  __device__ __forceinline__ explicit Int8Finish(const Int8GemmParams& params)
      : params(params), m(params.m), n(params.n), out(params.out) {}

  __device__ __forceinline__ Feature feature(int64_t feature) const {
    return load_int8_feature(params, min(feature, n - 1));
  }
  __device__ __forceinline__ Token token(int64_t token) const {
    return load_int8_token(params, min(token, m - 1));
  }
  __device__ __forceinline__ float apply(int32_t sum, Feature feature, Token token) const {
    return __fadd_rn(scaled_int8_sum(sum, feature, token), feature.bias);
  }

  const Int8GemmParams& params;
  const int64_t m, n;
  void* const out;
};

struct Int8Wgmma {
  using InT = int8_t;
  using Params = Int8GemmParams;
  using Finish = Int8Finish;
  static constexpr bool kSplits = true;
  template <class C>
  using Promotion = NoPromotion<C>;
};

struct Int8GemmShape {
  SsGemmShape tile;
  int stage_time;  // of an SsGemmCandidate
};

// Up to 128 tokens times are those of e4m3, at whose rate int8 is multiplied. The others are fitted
// as told in ss_gemm_sm90.cu: choices were 0.9 % slower than the best plans. Clusters of two such
// tiles of 256 that share their loads are 1 to 9 % slower for 1024 tokens, and no faster for
// 4096.
constexpr std::array<Int8GemmShape, 6> kShapes{{
    {{16, 1, 5, 2, 1, 16, false}, 117},
    {{32, 1, 5, 2, 1, 32, false}, 120},
    {{64, 1, 4, 2, 1, 32, false}, 155},
    {{128, 1, 5, 1, 1, 128, false}, 281},
    {{192, 1, 4, 1, 1, 192, true}, 676},
    {{256, 1, 4, 1, 1, 64, false}, 863},
}};
using ShapeIndices = std::make_index_sequence<kShapes.size()>;
using Residency = std::array<SsGemmResidency, kShapes.size()>;

template <size_t kShape>
using TileGemm = SsGemm<Int8Wgmma, kShapes[kShape].tile>;

template <size_t... kIndices>
Residency find_residency(std::index_sequence<kIndices...>) {
  return {ss_gemm_residency<TileGemm<kIndices>>(kOp)...};
}

template <size_t kShape>
void launch_tile_gemm(const Int8GemmParams& params, SsGemmPlan cut, cudaStream_t stream) {
  using C = TileGemm<kShape>;
  launch_ss_gemm<C>(kOp, params, params.out_dtype, cut, kPrefetchBytes<C>, stream);
}

template <size_t... kIndices>
void launch(const Int8GemmParams& params, const SsGemmChoice& choice, cudaStream_t stream,
            std::index_sequence<kIndices...>) {
  ((kIndices == choice.shape ? launch_tile_gemm<kIndices>(params, choice.cut, stream) : void()),
   ...);
}

}  // namespace

bool takes_int8_gemm_sm90(const Int8GemmParams& params) { return takes_8bit_ss_gemm(params); }

void launch_int8_gemm_sm90(const Int8GemmParams& params, int device, cudaStream_t stream) {
  static PerDevice<Residency> known;
  const Residency residency = known.get(device, [] { return find_residency(ShapeIndices()); });
  std::array<SsGemmCandidate, kShapes.size()> candidates;
  for (size_t index = 0; index < candidates.size(); ++index) {
    candidates[index] = {kShapes[index].tile, kShapes[index].stage_time, residency[index]};
  }
  const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device, kOp);
  const SsGemmProblem problem{params.m, params.n, params.k, params.out_dtype};
  launch(params, plan_ss_gemm(problem, candidates, num_sms), stream, ShapeIndices());
}

}  // namespace effllm
