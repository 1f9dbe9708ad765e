// lut4_gemm for few tokens: the Weights of packed_gemm_direct_sm90.cuh. A group's products are of
// codebook entries, its scale is applied to their sum.
//
// A look-up takes 25 instructions for eight weights where a subtraction takes 11: some 400 clocks
// of a scheduler per step, of which 316 would draw 3 TB/s.
#include <cstdint>
#include <limits>

#include "gemm/lut4_gemm_sm90.h"
#include "gemm/lut4_planes.cuh"
#include "gemm/packed_gemm_direct_sm90.cuh"
#include "quant/dequant.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "lut4_gemm";

template <class InT_, int kGroups_, bool kHasScales>
struct Lut4DirectWeights {
  using InT = InT_;
  using Params = Lut4GemmParams;
  static constexpr int kGroups = kGroups_;
  static constexpr bool kZeroPastK = true;

  struct Raw {
    uint32_t scale[2];
  };

  struct Source {
    uint32_t scales[2];
    int groups_left;

    __device__ __forceinline__ void enter(const Params& params, int row, int group) {
      const auto num_groups = static_cast<int>(params.num_groups);
      group = min(group, num_groups - 1);
      groups_left = num_groups - group;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = direct_row(params, row + 8 * half);
        scales[half] = direct_position(n, group, params.stride_scales_n, params.stride_scales_g);
      }
    }

    __device__ __forceinline__ Raw load_next(const Params& params) {
      Raw raw{};
      if constexpr (kHasScales) {
        const bool more = kGroups == 1 ? params.num_groups > 1 : --groups_left > 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          raw.scale[half] = params.scales_dtype == DType::kFloat32
                                ? static_cast<const uint32_t*>(params.scales)[scales[half]]
                                : static_cast<const uint16_t*>(params.scales)[scales[half]];
          if (more) scales[half] += static_cast<uint32_t>(params.stride_scales_g);
        }
      }
      return raw;
    }
  };

  // The codebooks of a block's rows; a single one is loaded once.
  __device__ __forceinline__ void enter_block(const Params& params, int row, bool is_first) {
    if (!is_first && params.stride_codebook_n == 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_lut4_planes<InT>(params, direct_row(params, row + 8 * half), 0, planes[half]);
    }
  }

  __device__ __forceinline__ void decode(const Params& params, const Raw& raw) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = kHasScales ? device_bits_to_float(raw.scale[half], params.scales_dtype) : 1.0f;
    }
  }

  __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) const {
    Lut4Dequant<InT>::fragment(word, planes[0], planes[1], a);
  }

  float scale[2];
  Lut4Planes planes[2];
};

template <class InT, int kGroups, bool kHasScales>
bool launch(const Lut4GemmParams& params, int num_sms, cudaStream_t stream) {
  using C = PackedGemmDirect<Lut4DirectWeights<InT, kGroups, kHasScales>, 2>;
  const auto plan = plan_packed_gemm_direct<C>(params, num_sms);
  if (plan) launch_packed_gemm_direct<C>(kOp, *plan, stream);
  return plan.has_value();
}

template <class InT>
bool launch(const Lut4GemmParams& params, int num_sms, cudaStream_t stream) {
  if (params.scales == nullptr) return launch<InT, 1, false>(params, num_sms, stream);
  if (params.num_groups > 1 && params.group_size == 32) {
    return launch<InT, 4, true>(params, num_sms, stream);
  }
  if (params.num_groups > 1 && params.group_size == 64) {
    return launch<InT, 2, true>(params, num_sms, stream);
  }
  return launch<InT, 1, true>(params, num_sms, stream);
}

}  // namespace

bool launch_lut4_gemm_direct_sm90(const Lut4GemmParams& params, int num_sms, cudaStream_t stream) {
  if (!has_near_elements(params.n, params.stride_scales_n, params.num_groups,
                         params.stride_scales_g)) {
    return false;
  }
  return params.dtype == DType::kFloat16 ? launch<float16>(params, num_sms, stream)
                                         : launch<bfloat16>(params, num_sms, stream);
}

}  // namespace effllm
