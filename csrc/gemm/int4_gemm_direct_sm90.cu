// int4_gemm for up to 8 tokens: the Weights of packed_gemm_direct_sm90.cuh, and which of its
// kernels a call takes. A group's products are of exact integers, its scale is applied to their
// sum.
#include <cstdint>

#include "gemm/int4_gemm_sm90.h"
#include "gemm/packed_gemm_direct_sm90.cuh"
#include "quant/dequant.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "int4_gemm";

template <class InT_, class ScaleT, bool kHasZeros, int kGroups_>
struct Int4DirectWeights {
  using InT = InT_;
  using Params = Int4GemmParams;
  using Dequant = Int4Dequant<InT>;
  static constexpr int kGroups = kGroups_;
  static constexpr bool kZeroPastK = false;

  struct Raw {
    device_t<ScaleT> scale[2];
    uint8_t zero[2];
  };

  struct Source {
    uint32_t scales[2], zeros[2];
    int groups_left;

    __device__ __forceinline__ void enter(const Params& params, int row, int group) {
      const auto num_groups = static_cast<int>(params.num_groups);
      group = min(group, num_groups - 1);
      groups_left = num_groups - group;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = direct_row(params, row + 8 * half);
        scales[half] = direct_position(n, group, params.stride_scales_n, params.stride_scales_g);
        zeros[half] = direct_position(n, group, params.stride_zeros_n, params.stride_zeros_g);
      }
    }

    __device__ __forceinline__ Raw load_next(const Params& params) {
      Raw raw;
      // A step has one group or is one of several steps of the only group; with more than one per
      // step the last of K may be missing.
      const bool more = kGroups == 1 ? params.num_groups > 1 : --groups_left > 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        raw.scale[half] = static_cast<const device_t<ScaleT>*>(params.scales)[scales[half]];
        if (more) scales[half] += static_cast<uint32_t>(params.stride_scales_g);
        if constexpr (kHasZeros) {
          raw.zero[half] = params.zeros[zeros[half]];
          if (more) zeros[half] += static_cast<uint32_t>(params.stride_zeros_g);
        }
      }
      return raw;
    }
  };

  __device__ __forceinline__ void enter_block(const Params&, int, bool) {}

  __device__ __forceinline__ void decode(const Params&, const Raw& raw) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = device_to_float(raw.scale[half]);
      zero[half] =
          Dequant::template zero_pair<!kHasZeros>(kHasZeros ? raw.zero[half] : kInt4PaddingCode);
    }
  }

  __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) const {
    // Register j holds rows g + 8 (j % 2).
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = Dequant::template codes<!kHasZeros>(word, j, zero[j % 2]);
  }

  float scale[2];
  typename Dequant::Pair zero[2];
};

template <class Weights, int kDepth>
bool launch(const Int4GemmParams& params, int num_sms, cudaStream_t stream) {
  using C = PackedGemmDirect<Weights, kDepth>;
  const auto plan = plan_packed_gemm_direct<C>(params, num_sms);
  if (plan) launch_packed_gemm_direct<C>(kOp, *plan, stream);
  return plan.has_value();
}

template <class InT, class ScaleT, bool kHasZeros>
bool launch(const Int4GemmParams& params, int num_sms, cudaStream_t stream) {
  if (params.num_groups > 1 && params.group_size == 32) {
    return launch<Int4DirectWeights<InT, ScaleT, kHasZeros, 4>, 2>(params, num_sms, stream);
  }
  if (params.num_groups > 1 && params.group_size == 64) {
    return launch<Int4DirectWeights<InT, ScaleT, kHasZeros, 2>, 2>(params, num_sms, stream);
  }
  // Deeper pays where a warp has enough to do; measured, 24 steps are about where it begins.
  using Weights = Int4DirectWeights<InT, ScaleT, kHasZeros, 1>;
  const double steps = static_cast<double>(params.n) / 16 / num_sms * (params.k / 128) / 16;
  return steps > 24 ? launch<Weights, 4>(params, num_sms, stream)
                    : launch<Weights, 2>(params, num_sms, stream);
}

template <class InT, class ScaleT>
bool launch(const Int4GemmParams& params, int num_sms, cudaStream_t stream) {
  return params.zeros != nullptr ? launch<InT, ScaleT, true>(params, num_sms, stream)
                                 : launch<InT, ScaleT, false>(params, num_sms, stream);
}

}  // namespace

bool launch_int4_gemm_direct_sm90(const Int4GemmParams& params, int num_sms, cudaStream_t stream) {
  if (!has_near_elements(params.n, params.stride_scales_n, params.num_groups,
                         params.stride_scales_g) ||
      !has_near_elements(params.n, params.stride_zeros_n, params.num_groups,
                         params.stride_zeros_g)) {
    return false;
  }
  if (params.dtype == DType::kBFloat16 && params.scales_dtype == DType::kBFloat16) {
    return launch<bfloat16, bfloat16>(params, num_sms, stream);
  }
  if (params.dtype == DType::kBFloat16 && params.scales_dtype == DType::kFloat16) {
    return launch<bfloat16, float16>(params, num_sms, stream);
  }
  if (params.dtype == DType::kFloat16 && params.scales_dtype == DType::kFloat16) {
    return launch<float16, float16>(params, num_sms, stream);
  }
  return false;
}

}  // namespace effllm
