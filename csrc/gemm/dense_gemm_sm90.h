// dense_gemm on Hopper: the host side, for code compiled for any architecture.
#pragma once

#include <cuda_runtime.h>

#include "gemm/dense_gemm.h"

namespace effllm {

void launch_dense_gemm_sm90(const DenseGemmParams& params, int device, cudaStream_t stream);

}  // namespace effllm
