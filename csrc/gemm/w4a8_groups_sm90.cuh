// Scales, zero points and multipliers on their way to the math warps of w4a8_gemm_sm90.cuh.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"
#include "gemm/tile_schedule.cuh"
#include "gemm/w4a8_codes.cuh"
#include "gemm/w4a8_gemm.h"
#include "ptx/load.cuh"

namespace effllm {

// Numbers [N, groups]. Positions are in elements: takes_w4a8_gemm_sm90 knows that 32 bits are
// enough.
template <class T>
struct W4A8Table {
  const T* data;
  uint32_t stride_n, stride_g;

  __device__ __forceinline__ W4A8Table(const void* data, int64_t stride_n, int64_t stride_g)
      : data(static_cast<const T*>(data)),
        stride_n(static_cast<uint32_t>(stride_n)),
        stride_g(static_cast<uint32_t>(stride_g)) {}

  __device__ __forceinline__ const T* at(int row, int group) const {
    return data + (static_cast<uint32_t>(row) * stride_n + static_cast<uint32_t>(group) * stride_g);
  }
};

// Of rows r and r + 8 of each 16, which a math warp's lanes want together: scales, and zero points
// or multipliers.
struct W4A8RowPair {
  uint32_t scale_bits[2];
  int bytes[2];
};

// Of one of the scales' warps, which take stages in turn: what its lanes bring into shared memory
// of each group, two pairs of rows each. The first group of its next stage is on its way from
// memory meanwhile, kScaleWarps stages ahead; a stage's others mostly lie in the same lines.
template <class C>
class W4A8Groups {
 public:
  __device__ __forceinline__ W4A8Groups(const W4A8GemmParams& params,
                                        const TileSchedule::Work& work, int first_stage)
      : params_(params),
        num_groups_(
            static_cast<int>(C::kMultiplies ? params.multipliers.num_groups : params.num_groups)),
        first_row_(work.row_tile * C::kRows + static_cast<int>(threadIdx.x) % 32 / 8 * 16 +
                   static_cast<int>(threadIdx.x) % 8),
        group_((work.first_k_tile + first_stage) * C::kStageGroups) {}

  // Into L2.
  __device__ __forceinline__ void prefetch() const {
    if (group_ >= num_groups_) return;
    for_rows([&](int, int, int row) {
      if constexpr (C::kGrouped) {
        if (params_.scales_dtype == DType::kFloat32) {
          ptx::prefetch_l2(scales<uint32_t>().at(row, group_));
        } else {
          ptx::prefetch_l2(scales<uint16_t>().at(row, group_));
        }
      }
      if constexpr (C::kHasBytes) ptx::prefetch_l2(bytes().at(row, group_));
    });
  }

  // That so many groups on, if there is one: a stage may have columns past K, where x is zero.
  __device__ __forceinline__ void load(int groups_on) {
    group_ += groups_on;
    const bool exists = group_ < num_groups_;
    for_rows([&](int i, int half, int row) {
      next_[i].scale_bits[half] = 0;
      next_[i].bytes[half] = kInt4PaddingCode;
      if (!exists) return;
      if constexpr (C::kGrouped) next_[i].scale_bits[half] = load_scale(row);
      if constexpr (C::kHasBytes) next_[i].bytes[half] = ptx::load_line(bytes().at(row, group_));
    });
  }

  // What was loaded.
  __device__ __forceinline__ void store(uint8_t* group) const {
    constexpr float kFactor = 1.f / (1 << C::Decode::kShift);  // sums are of 16-fold codes: exact
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
      if constexpr (C::kGrouped) {
        const auto scale = [&](int half) {
          return bits_to_float(next_[i].scale_bits[half]) * kFactor;
        };
        reinterpret_cast<float2*>(group)[i * 32 + lane] = {scale(0), scale(1)};
      }
      if constexpr (C::kHasBytes) {
        reinterpret_cast<uint16_t*>(group + C::kScaleBytes)[i * 32 + lane] =
            static_cast<uint16_t>(C::Decode::pair(next_[i].bytes[0], next_[i].bytes[1]));
      }
    }
  }

 private:
  // f(strip, half, row). Rows past N are computed on what is there and never stored: any will do.
  template <class F>
  __device__ __forceinline__ void for_rows(const F& f) const {
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        f(i, half, min(first_row_ + i * 64 + half * 8, static_cast<int>(params_.n) - 1));
      }
    }
  }

  // device_bits_to_float without branches.
  __device__ __forceinline__ float bits_to_float(uint32_t bits) const {
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    const int shift = params_.scales_dtype == DType::kBFloat16 ? 16 : 0;
    return params_.scales_dtype == DType::kFloat16 ? half : __uint_as_float(bits << shift);
  }

  template <class T>
  __device__ __forceinline__ W4A8Table<T> scales() const {
    return {params_.scales, params_.stride_scales_n, params_.stride_scales_g};
  }

  __device__ __forceinline__ W4A8Table<uint8_t> bytes() const {
    if constexpr (C::kMultiplies) {
      const W4A8Multipliers& from = params_.multipliers;
      return {from.data, from.stride_n, from.stride_g};
    } else {
      return {params_.zeros, params_.stride_zeros_n, params_.stride_zeros_g};
    }
  }

  __device__ __forceinline__ uint32_t load_scale(int row) const {
    return params_.scales_dtype == DType::kFloat32
               ? ptx::load_line(scales<uint32_t>().at(row, group_))
               : ptx::load_line(scales<uint16_t>().at(row, group_));
  }

  const W4A8GemmParams& params_;
  const int num_groups_, first_row_;
  int group_;
  W4A8RowPair next_[C::kStrips];  // nothing waits for a load before it is used
};

// The zero points of this thread's two rows, with one group.
template <class C>
__device__ __forceinline__ typename C::Decode::Rows load_channel_zeros(
    const W4A8GemmParams& params, const TileSchedule::Work& work) {
  const int first_row = work.row_tile * C::kRows + static_cast<int>(threadIdx.x) / 32 * 16 +
                        static_cast<int>(threadIdx.x) % 32 / 4;
  const auto zero = [&](int half) {
    const int64_t row = min(first_row + 8 * half, static_cast<int>(params.n) - 1);
    return static_cast<int>(params.zeros[row * params.stride_zeros_n]);
  };
  return C::Decode::rows(C::Decode::pair(zero(0), zero(1)));
}

}  // namespace effllm
