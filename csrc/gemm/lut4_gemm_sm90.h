// lut4_gemm on Hopper: the host side, for code compiled for any architecture. Two of the kernels of
// int4_gemm:
//
//   direct  up to 8 tokens
//   narrow  more, 32 at a time; for so many that weights had better be converted only once the
//           mma.sync kernel, which takes everything, is quicker
#pragma once

#include <cuda_runtime.h>

#include "gemm/lut4_gemm.h"
#include "gemm/packed_gemm_narrow_sm90.h"

namespace effllm {

// Launches one of them if it takes these arguments. Not taken: a codebook per group, rows of x that
// TMA cannot read, and, depending on K, groups of 32 or a K that is no multiple of 256.
bool launch_lut4_gemm_sm90(const Lut4GemmParams& params, int device, cudaStream_t stream);

bool launch_lut4_gemm_direct_sm90(const Lut4GemmParams& params, int num_sms, cudaStream_t stream);

PackedGemmNarrowResidency lut4_gemm_narrow_residency();
void launch_lut4_gemm_narrow_sm90(const Lut4GemmParams& params, const PackedGemmNarrowPlan& plan,
                                  cudaStream_t stream);

}  // namespace effllm
