// Scales and zero points on their way to the math warps of w4a8_gemm_sm90.cuh.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"
#include "gemm/tile_schedule.cuh"
#include "gemm/w4a8_gemm.h"

namespace effllm {

// Scales and zero points of rows r and r + 8 of each 16, as a math warp's lanes want them.
struct W4A8RowPair {
  uint32_t scale_bits[2];
  int zeros[2];
};

// Of the scales' warp: what its lanes bring into shared memory of each group, two pairs of rows
// each. What is needed of the next group is on its way from memory meanwhile.
template <class C>
class W4A8Groups {
 public:
  __device__ __forceinline__ W4A8Groups(const W4A8GemmParams& params,
                                        const TileSchedule::Work& work)
      : params_(params),
        first_row_(work.row_tile * C::kRows + static_cast<int>(threadIdx.x) % 32 / 8 * 16 +
                   static_cast<int>(threadIdx.x) % 8),
        group_(work.first_k_tile * C::kStageGroups) {
    load();
  }

  // The next group's, if there is one: a stage may have columns past K, where x is zero.
  __device__ __forceinline__ void store(uint8_t* scales) {
    constexpr float kFactor = 1.f / (1 << C::Decode::kShift);  // sums are of 16-fold codes: exact
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
      const auto scale = [&](int half) {
        return bits_to_float(next_[i].scale_bits[half]) * kFactor;
      };
      reinterpret_cast<float2*>(scales)[i * 32 + lane] = {scale(0), scale(1)};
      if constexpr (C::kHasZeros) {
        const auto zero = [&](int half) { return min(next_[i].zeros[half], kW4A8MaxZero); };
        reinterpret_cast<uint16_t*>(scales + C::kScaleBytes)[i * 32 + lane] =
            static_cast<uint16_t>(zero(0) | zero(1) << 8);
      }
    }
    ++group_;
    load();
  }

 private:
  // device_bits_to_float without branches.
  __device__ __forceinline__ float bits_to_float(uint32_t bits) const {
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    const int shift = params_.scales_dtype == DType::kBFloat16 ? 16 : 0;
    return params_.scales_dtype == DType::kFloat16 ? half : __uint_as_float(bits << shift);
  }

  // Positions in elements: takes_w4a8_gemm_sm90 knows that 32 bits are enough.
  static __device__ __forceinline__ uint32_t position(int row, int group, int64_t stride_n,
                                                      int64_t stride_g) {
    return static_cast<uint32_t>(row) * static_cast<uint32_t>(stride_n) +
           static_cast<uint32_t>(group) * static_cast<uint32_t>(stride_g);
  }

  __device__ __forceinline__ void load() {
    const bool exists = group_ < params_.num_groups;
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Rows past N are computed on what is there and never stored: any will do.
        const int row = min(first_row_ + i * 64 + half * 8, static_cast<int>(params_.n) - 1);
        next_[i].scale_bits[half] = 0;
        next_[i].zeros[half] = kInt4PaddingCode;
        if (!exists) continue;
        const uint32_t at = position(row, group_, params_.stride_scales_n, params_.stride_scales_g);
        next_[i].scale_bits[half] = params_.scales_dtype == DType::kFloat32
                                        ? static_cast<const uint32_t*>(params_.scales)[at]
                                        : static_cast<const uint16_t*>(params_.scales)[at];
        if constexpr (C::kHasZeros) {
          next_[i].zeros[half] =
              params_.zeros[position(row, group_, params_.stride_zeros_n, params_.stride_zeros_g)];
        }
      }
    }
  }

  const W4A8GemmParams& params_;
  const int first_row_;
  int group_;
  W4A8RowPair next_[C::kStrips];  // nothing waits for a load before it is used
};

// The zero points of this thread's two rows, with one group.
template <class C>
__device__ __forceinline__ void load_channel_zeros(const W4A8GemmParams& params,
                                                   const TileSchedule::Work& work,
                                                   uint32_t (&zeros)[2]) {
  const int first_row = work.row_tile * C::kRows + static_cast<int>(threadIdx.x) / 32 * 16 +
                        static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = min(first_row + 8 * half, static_cast<int>(params.n) - 1);
    zeros[half] = C::Decode::zero_bytes(params.zeros[row * params.stride_zeros_n]);
  }
}

}  // namespace effllm
