// Tensor maps for TMA. The driver's encoder is found at run time: linking libcuda would keep the
// library from loading on machines without a driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/dtype.h"
#include "cuda/launch.h"

namespace effllm {

// A matrix of 16-bit floats [rows, cols], 16-byte aligned, its rows `row_stride` elements apart, a
// multiple of 8; read in boxes of `box_rows` x 64 elements that land in shared memory as 128-byte
// rows under the 128-byte swizzle.
inline CUtensorMap make_tensor_map(const void* data, DType dtype, int64_t rows, int64_t cols,
                                   int64_t row_stride, int box_rows, const char* op) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &result);
    return status == cudaSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) fail(op, "the driver has no cuTensorMapEncodeTiled: it must be >= 12.0");

  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status =
      encode(&map, type, 2, const_cast<void*>(data), sizes, row_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail(op, "cuTensorMapEncodeTiled failed with " + std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace effllm
