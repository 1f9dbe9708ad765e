// out[m, k] = x[m, perm[k]], for GEMMs that cannot gather the columns of x while they load it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace effllm {

struct GatherColumns {
  int64_t m, k;
  const void* x;        // [M, K] of 16-bit elements, contiguous
  const int32_t* perm;  // [K]; entries out of range are clamped
  void* out;            // [M, K], contiguous, 16-byte aligned
};

void launch_gather_columns(const char* op, const GatherColumns& params, cudaStream_t stream);

}  // namespace effllm
