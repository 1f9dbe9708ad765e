// int4_gemm for up to 32 tokens: the Weights of packed_gemm_narrow_sm90.cuh. Products are of exact
// integers (q - zero).
#include <cstdint>

#include "gemm/int4_gemm_sm90.h"
#include "gemm/packed_gemm_narrow_sm90.cuh"
#include "quant/dequant.cuh"

namespace effllm {
namespace {

// `kSymmetric`: known to have no zero points.
template <class InT_, bool kSymmetric>
struct Int4NarrowWeights {
  using InT = InT_;
  using Params = Int4GemmParams;
  using Dequant = Int4Dequant<InT>;
  using Pair = typename Dequant::Pair;
  static constexpr const char* kOp = "int4_gemm";

  struct RowGroup {
    float scale;
    uint32_t zero_pair;  // as dequantisation subtracts it
  };

  template <int kThreads, class Offset>
  static __device__ __forceinline__ void load_rest(const Params& params, RowGroup* row_groups,
                                                   int count, const Offset& offset) {
    const auto store_zero = [&](int i, uint8_t zero) {
      const auto pair = Dequant::template zero_pair<kSymmetric>(zero);
      row_groups[i].zero_pair = reinterpret_cast<const uint32_t&>(pair);
    };
    if (kSymmetric || params.zeros == nullptr) {
      for (int i = threadIdx.x; i < count; i += kThreads) store_zero(i, kInt4PaddingCode);
    } else {
      copy_batched<kThreads>(
          count,
          [&](int i) {
            return params.zeros[offset(i, params.stride_zeros_n, params.stride_zeros_g)];
          },
          store_zero);
    }
  }

  __device__ __forceinline__ void enter(const Params&, int64_t) {}
  __device__ __forceinline__ void set(int half, const RowGroup& row_group) {
    zero[half] = reinterpret_cast<const Pair&>(row_group.zero_pair);
  }
  __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = Dequant::template codes<kSymmetric>(word, j, zero[j % 2]);
  }

  Pair zero[2];
};

}  // namespace

PackedGemmNarrowResidency int4_gemm_narrow_residency() {
  return packed_gemm_narrow_residency<Int4NarrowWeights<bfloat16, true>>();
}

void launch_int4_gemm_narrow_sm90(const Int4GemmParams& params, const PackedGemmNarrowPlan& plan,
                                  cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) {  // gains nothing from being symmetric
    launch_packed_gemm_narrow_sm90<Int4NarrowWeights<float16, false>>(params, plan, stream);
  } else if (params.zeros != nullptr) {
    launch_packed_gemm_narrow_sm90<Int4NarrowWeights<bfloat16, false>>(params, plan, stream);
  } else {
    launch_packed_gemm_narrow_sm90<Int4NarrowWeights<bfloat16, true>>(params, plan, stream);
  }
}

}  // namespace effllm
