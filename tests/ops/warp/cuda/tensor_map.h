// In place of csrc/cuda/tensor_map.h: swizzled boxes alone.
#pragma once

#include <cuda.h>

#include <cstdio>
#include <cstdlib>

#include "common/dtype.h"

namespace effllm {

inline CUtensorMap make_tensor_map(const void* data, DType dtype, int64_t rows, int64_t cols,
                                   int64_t row_stride, int box_rows, const char*) {
  const auto bytes = static_cast<int>(element_bytes(dtype));
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || row_stride * bytes % 16 != 0) {
    std::printf("a tensor map's rows must start at multiples of 16 bytes\n");
    std::exit(1);
  }
  return {const_cast<char*>(static_cast<const char*>(data)),
          rows,
          cols * bytes,
          row_stride * bytes,
          box_rows,
          bytes};
}

}  // namespace effllm
