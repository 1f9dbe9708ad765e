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

// What of a matrix TMA moves at a time. A swizzled box is 128 bytes wide, or 64, and its rows lie
// in shared memory one after another under the swizzle of as many.
struct TensorMapBox {
  int cols, rows;
  bool swizzled;
};

inline CUtensorMapDataType tensor_map_type(DType dtype, const char* op) {
  switch (dtype) {
    case DType::kInt8:
    case DType::kFloat8E4M3:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default:
      fail(op, std::string("TMA does not move ") + dtype_name(dtype));
  }
}

// A matrix [rows, cols], 16-byte aligned, its rows `row_stride` elements apart, a multiple of 16
// bytes.
inline CUtensorMap make_tensor_map(const void* data, DType dtype, int64_t rows, int64_t cols,
                                   int64_t row_stride, TensorMapBox box, const char* op) {
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
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(row_stride * element_bytes(dtype))};
  const cuuint32_t box_sizes[2] = {static_cast<cuuint32_t>(box.cols),
                                   static_cast<cuuint32_t>(box.rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto swizzle = !box.swizzled                           ? CU_TENSOR_MAP_SWIZZLE_NONE
                       : box.cols * element_bytes(dtype) == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                               : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult status =
      encode(&map, tensor_map_type(dtype, op), 2, const_cast<void*>(data), sizes, row_bytes,
             box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail(op, "cuTensorMapEncodeTiled failed with " + std::to_string(static_cast<int>(status)));
  }
  return map;
}

// In swizzled boxes of `box_rows` rows.
inline CUtensorMap make_tensor_map(const void* data, DType dtype, int64_t rows, int64_t cols,
                                   int64_t row_stride, int box_rows, const char* op) {
  const TensorMapBox box{128 / static_cast<int>(element_bytes(dtype)), box_rows, true};
  return make_tensor_map(data, dtype, rows, cols, row_stride, box, op);
}

}  // namespace effllm
