// Scales of e4m3 operands as kernels read them, whatever their type and granularity.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"
#include "gemm/fp8_gemm.h"

namespace effllm {

__device__ __forceinline__ float load_fp8_scale(const Fp8Scales& scales, int64_t row,
                                                int64_t group) {
  if (scales.data == nullptr) return 1.f;
  return device_load_float(scales.data, scales.dtype, scales.index(row, group));
}

}  // namespace effllm
