// lut4_gemm for up to 32 tokens at a time: the Weights of packed_gemm_narrow_sm90.cuh. Products are
// of codebook entries.
#include <cstdint>

#include "gemm/lut4_gemm_sm90.h"
#include "gemm/lut4_planes.cuh"
#include "gemm/packed_gemm_narrow_sm90.cuh"
#include "quant/dequant.cuh"

namespace effllm {
namespace {

template <class InT_>
struct Lut4NarrowWeights {
  using InT = InT_;
  using Params = Lut4GemmParams;
  static constexpr const char* kOp = "lut4_gemm";

  struct RowGroup {
    float scale;
  };

  template <int kThreads, class Offset>
  static __device__ __forceinline__ void load_rest(const Params&, RowGroup*, int, const Offset&) {}

  __device__ __forceinline__ void enter(const Params& params, int64_t row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_lut4_planes<InT>(params, min(row + 8 * half, params.n - 1), 0, planes[half]);
    }
  }
  __device__ __forceinline__ void set(int, const RowGroup&) {}
  __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) const {
    Lut4Dequant<InT>::fragment(word, planes[0], planes[1], a);
  }

  Lut4Planes planes[2];
};

}  // namespace

PackedGemmNarrowResidency lut4_gemm_narrow_residency() {
  return packed_gemm_narrow_residency<Lut4NarrowWeights<bfloat16>>();
}

void launch_lut4_gemm_narrow_sm90(const Lut4GemmParams& params, const PackedGemmNarrowPlan& plan,
                                  cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) {
    launch_packed_gemm_narrow_sm90<Lut4NarrowWeights<float16>>(params, plan, stream);
  } else {
    launch_packed_gemm_narrow_sm90<Lut4NarrowWeights<bfloat16>>(params, plan, stream);
  }
}

}  // namespace effllm
