// The codebook of one row into registers, for kernels whose lanes hold rows as mma fragments do.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"
#include "gemm/lut4_gemm.h"
#include "quant/dequant.cuh"

namespace effllm {

// Of row n and one group. Whole warps call it together: the four lanes of a row load four entries
// each and tell one another.
template <class InT>
__device__ __forceinline__ void load_lut4_planes(const Lut4GemmParams& params, int64_t n,
                                                 int64_t group, Lut4Planes& planes) {
  const int first = 4 * (threadIdx.x % 4);
  const int64_t start = n * params.stride_codebook_n + group * params.stride_codebook_g;
  float entries[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    entries[i] = device_load_float(params.codebook, params.codebook_dtype,
                                   start + (first + i) * params.stride_codebook_entry);
  }
  uint32_t low, high;
  Lut4Dequant<InT>::plane_words(entries, low, high);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    planes.low[i] = __shfl_sync(0xffffffffu, low, i, 4);
    planes.high[i] = __shfl_sync(0xffffffffu, high, i, 4);
  }
}

}  // namespace effllm
