// fp8_gemm on wgmma: e4m3 operands for the kernel of ss_gemm_sm90.cuh, where what bounds it is
// said.
//
// The tensor cores keep some 14 bits of a sum of e4m3 products. So what they add up of 128 columns,
// or of up to 512 for a bf16 output, which keeps 8, is added in fp32 by the CUDA cores, scaled
// first where there are scales of groups or blocks:
//
//   K ->        [ 128 columns ][ 128 columns ][ 128 columns ] ...     a stage of the ring each
//                 wgmma          wgmma
//                   \  x_scale[token, group] * w_scale[block, group]
//   sums (fp32)      +------------------+------------------+ ...
//
// While one warpgroup adds, the tensor cores multiply for the other. Scales of whole rows are
// applied at the end. Scales of x come with the stage, by TMA, and are [groups, M] for that: the
// layout that fp8_quantize gives them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm/fp8_gemm_sm90.h"
#include "gemm/fp8_scale.cuh"
#include "gemm/ss_gemm_sm90.cuh"

namespace effllm {

struct Fp8WgmmaParams : Fp8GemmParams {
  CUtensorMap x_scales_map;  // where sums are scaled group by group
};

// Sums as they are: of kFp8BFloat16Columns where the output is bf16, else of 128.
template <class C>
class Fp8Sums {
 public:
  static constexpr int kStageBytes = 0;

  __device__ __forceinline__ Fp8Sums(const Fp8WgmmaParams& params, const TileSchedule::Work&)
      : stages_(params.out_dtype == DType::kBFloat16 ? kFp8BFloat16Columns / C::kTileK : 1) {}

  // Of which the tensor core may add up the products.
  __device__ __forceinline__ int stages() const { return stages_; }

  __device__ __forceinline__ void enter(int) {}
  __device__ __forceinline__ void load(const uint8_t*, int) {}

  template <int kCount>
  __device__ __forceinline__ void add(const uint8_t*, const float (&partial)[kCount],
                                      float (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += partial[i];
  }

 private:
  const int stages_;
};

// Sums of 128 columns times their scales: those of the tile's tokens, and one of the weight. A
// warpgroup's rows of the weight, or all of the tile's columns, are of one block.
template <class C>
class Fp8ScaledSums {
 public:
  static constexpr int kStageBytes = 4 * fp8_scales_box(C::kTokens);
  static constexpr int kGroupRows = C::kRowBlocks * kBlockRows;
  static_assert(C::kTokenRows ? C::kCols <= 128 : kGroupRows <= 128);

  static __device__ __forceinline__ void produce(const Fp8WgmmaParams& params, uint8_t* smem,
                                                 uint64_t* full, const TileSchedule::Work& work,
                                                 int k_tile) {
    const int first_token = (C::kTokenRows ? work.row_tile : work.col_tile) * C::kTokens;
    ptx::tma_load_2d(smem, &params.x_scales_map, full, first_token, k_tile);
  }

  __device__ __forceinline__ Fp8ScaledSums(const Fp8WgmmaParams& params,
                                           const TileSchedule::Work& work)
      : params_(params), first_k_tile_(work.first_k_tile) {
    const int feature =
        C::kTokenRows ? work.col_tile * C::kCols : work.row_tile * C::kRows + group() * kGroupRows;
    feature_ = min(feature, static_cast<int>(params.n) - 1);
    next_ = load(0);
  }

  // Each lane has the weight's scale of another tile, loaded 32 tiles before it is used.
  __device__ __forceinline__ void enter(int tile) {
    if (tile % 32 == 0) {
      of_lane_ = next_;
      next_ = load(tile + 32);
    }
    w_scale_ = __shfl_sync(~0u, of_lane_, tile % 32);
  }

  // Tokens past M have scales of 0. Where rows are tokens, a lane has two of them.
  __device__ __forceinline__ void load(const uint8_t* smem, int block) {
    if constexpr (C::kTokenRows) {
      const auto* x_scales = reinterpret_cast<const float*>(smem) + group() * kGroupRows +
                             block * kBlockRows + threadIdx.x % 128 / 32 * 16 +
                             threadIdx.x % 32 / 4;
      low_ = w_scale_ * x_scales[0], high_ = w_scale_ * x_scales[8];
    }
  }

  template <int kCount>
  __device__ __forceinline__ void add(const uint8_t* smem, const float (&partial)[kCount],
                                      float (&sums)[kCount]) const {
    if constexpr (C::kTokenRows) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        sums[i] += low_ * partial[i], sums[i + 1] += low_ * partial[i + 1];
        sums[i + 2] += high_ * partial[i + 2], sums[i + 3] += high_ * partial[i + 3];
      }
    } else {
      const auto* x_scales = reinterpret_cast<const float2*>(smem) + threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float2 x_scale = x_scales[i];  // of 8 tokens' scales, two
        const float even = w_scale_ * x_scale.x, odd = w_scale_ * x_scale.y;
        sums[i] += even * partial[i], sums[i + 1] += odd * partial[i + 1];
        sums[i + 2] += even * partial[i + 2], sums[i + 3] += odd * partial[i + 3];
      }
    }
  }

 private:
  static __device__ __forceinline__ int group() { return threadIdx.x / 128; }

  __device__ __forceinline__ float load(int tile) const {
    if (!params_.w_scales.grouped) return 1.0f;
    const int last = static_cast<int>(params_.k - 1) / static_cast<int>(kFp8GroupSize);
    const int k_tile = first_k_tile_ + tile + static_cast<int>(threadIdx.x % 32);
    return load_fp8_scale(params_.w_scales, feature_, min(k_tile, last));
  }

  const Fp8WgmmaParams& params_;
  const int first_k_tile_;
  int feature_;
  float of_lane_ = 0, next_, w_scale_ = 0, low_ = 0, high_ = 0;
};

// The scales that are left to apply to whole sums, and the bias.
template <bool kGrouped>
struct Fp8Finish {
  struct Feature {
    float scale, bias;
  };
  struct NoToken {};
  using Token = std::conditional_t<kGrouped, NoToken, float>;

  __device__ __forceinline__ explicit Fp8Finish(const Fp8WgmmaParams& params)
      : params(params), m(params.m), n(params.n), out(params.out) {}

  __device__ __forceinline__ Feature feature(int64_t feature) const {
    const int64_t in_bounds = min(feature, n - 1);
    Feature terms{1.0f, 0.0f};
    if (!kGrouped || !params.w_scales.grouped) {
      terms.scale = load_fp8_scale(params.w_scales, in_bounds, 0);
    }
    if (params.bias != nullptr) {
      terms.bias =
          device_load_float(params.bias, params.bias_dtype, in_bounds * params.stride_bias);
    }
    return terms;
  }

  __device__ __forceinline__ Token token(int64_t token) const {
    if constexpr (kGrouped) {
      return {};
    } else {
      return load_fp8_scale(params.x_scales, min(token, m - 1), 0);
    }
  }

  __device__ __forceinline__ float apply(float sum, Feature feature, Token token) const {
    if constexpr (kGrouped) {
      return sum * feature.scale + feature.bias;
    } else {
      return sum * (feature.scale * token) + feature.bias;
    }
  }

  const Fp8WgmmaParams& params;
  const int64_t m, n;
  void* const out;
};

template <Fp8Summation kSummation>
struct Fp8Wgmma {
  using InT = float8_e4m3;
  using Params = Fp8WgmmaParams;
  using Finish = Fp8Finish<kSummation == Fp8Summation::kScaled>;
  static constexpr bool kSplits = true;
  template <class C>
  using Promotion = std::conditional_t<
      kSummation == Fp8Summation::kTensorCore, NoPromotion<C>,
      std::conditional_t<kSummation == Fp8Summation::kPlain, Fp8Sums<C>, Fp8ScaledSums<C>>>;
};

template <Fp8Summation kSummation, size_t kShape>
using Fp8TileGemm = SsGemm<Fp8Wgmma<kSummation>, kFp8GemmShapes[kShape].tile>;

// Whether the summation has kernels of the shape.
template <Fp8Summation kSummation, size_t kShape>
inline constexpr bool kHasFp8TileGemm =
    kFp8GemmShapes[kShape].stage_time[static_cast<size_t>(kSummation)] != 0;

template <Fp8Summation kSummation, size_t kShape>
void launch_fp8_tile_gemm(const Fp8GemmParams& params, SsGemmPlan cut, cudaStream_t stream) {
  if constexpr (kHasFp8TileGemm<kSummation, kShape>) {
    using C = Fp8TileGemm<kSummation, kShape>;
    Fp8WgmmaParams wgmma_params{params, {}};
    if constexpr (kSummation == Fp8Summation::kScaled) {
      const TensorMapBox box{fp8_scales_box(C::kTokens), 1, false};
      wgmma_params.x_scales_map = make_tensor_map(
          params.x_scales.data, DType::kFloat32, ceil_div<int64_t>(params.k, kFp8GroupSize),
          params.m, params.x_scales.stride_group, box, "fp8_gemm");
    }
    launch_ss_gemm<C>("fp8_gemm", wgmma_params, params.out_dtype, cut, kPrefetchBytes<C>, stream);
  }
}

template <Fp8Summation kSummation, size_t... kShapes>
void launch_fp8_wgmma(const Fp8GemmParams& params, const SsGemmChoice& plan, cudaStream_t stream,
                      std::index_sequence<kShapes...>) {
  ((kShapes == plan.shape ? launch_fp8_tile_gemm<kSummation, kShapes>(params, plan.cut, stream)
                          : void()),
   ...);
}

template <Fp8Summation kSummation>
void launch_fp8_wgmma(const Fp8GemmParams& params, const SsGemmChoice& plan, cudaStream_t stream) {
  constexpr std::make_index_sequence<kFp8GemmShapes.size()> kShapes;
  launch_fp8_wgmma<kSummation>(params, plan, stream, kShapes);
}

template <Fp8Summation kSummation, size_t kShape>
SsGemmResidency resident_fp8_clusters() {
  if constexpr (kHasFp8TileGemm<kSummation, kShape>) {
    return ss_gemm_residency<Fp8TileGemm<kSummation, kShape>>("fp8_gemm");
  } else {
    return {};
  }
}

template <Fp8Summation kSummation, size_t... kShapes>
Fp8GemmResidency fp8_wgmma_residency(std::index_sequence<kShapes...>) {
  return {resident_fp8_clusters<kSummation, kShapes>()...};
}

template <Fp8Summation kSummation>
Fp8GemmResidency fp8_wgmma_residency() {
  return fp8_wgmma_residency<kSummation>(std::make_index_sequence<kFp8GemmShapes.size()>());
}

}  // namespace effllm
