// w4a8_gemm on Hopper: the host side, for code compiled for any architecture. One kernel,
// w4a8_gemm_sm90.cuh, in a file for each way in which sums get their scales.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "gemm/w4a8_gemm.h"

namespace effllm {

// Whether TMA can read the rows of x and write those of out, groups with scales are whole units of
// 64 columns, and what they have lies at 32-bit positions.
inline bool takes_w4a8_gemm_sm90(const W4A8GemmParams& params) {
  constexpr int64_t kAlignment = 16;  // bytes
  const auto is_aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
  };
  const auto is_near = [&](int64_t num_groups, int64_t stride_n, int64_t stride_g) {
    return (params.n - 1) * stride_n + (num_groups - 1) * stride_g <=
           std::numeric_limits<uint32_t>::max();
  };
  const W4A8Multipliers& multipliers = params.multipliers;
  return params.k > 0 && params.k % kAlignment == 0 && is_aligned(params.x) &&
         params.n * element_bytes(params.out_dtype) % kAlignment == 0 && is_aligned(params.out) &&
         (params.num_groups == 1 || params.group_size >= 64) &&
         is_near(params.num_groups, params.stride_scales_n, params.stride_scales_g) &&
         is_near(params.num_groups, params.stride_zeros_n, params.stride_zeros_g) &&
         is_near(multipliers.num_groups, multipliers.stride_n, multipliers.stride_g);
}

// Of arguments that it takes, with one group, with multipliers, with groups of 64 and of 128.
void launch_w4a8_gemm_channel_sm90(const W4A8GemmParams& params, int device, cudaStream_t stream);
void launch_w4a8_gemm_multipliers_sm90(const W4A8GemmParams& params, int device,
                                       cudaStream_t stream);
void launch_w4a8_gemm_group64_sm90(const W4A8GemmParams& params, int device, cudaStream_t stream);
void launch_w4a8_gemm_group128_sm90(const W4A8GemmParams& params, int device, cudaStream_t stream);

inline void launch_w4a8_gemm_sm90(const W4A8GemmParams& params, int device, cudaStream_t stream) {
  if (params.multipliers.data != nullptr) {
    launch_w4a8_gemm_multipliers_sm90(params, device, stream);
  } else if (params.num_groups == 1) {
    launch_w4a8_gemm_channel_sm90(params, device, stream);
  } else if (params.group_size == 64) {
    launch_w4a8_gemm_group64_sm90(params, device, stream);
  } else {
    launch_w4a8_gemm_group128_sm90(params, device, stream);
  }
}

}  // namespace effllm
