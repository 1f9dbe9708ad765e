// int8_gemm on Hopper: the host side, for code compiled for any architecture.
#pragma once

#include <cuda_runtime.h>

#include "gemm/int8_gemm.h"

namespace effllm {

// Whether TMA can read and write the rows of x, W and out.
bool takes_int8_gemm_sm90(const Int8GemmParams& params);

// Of arguments that it takes.
void launch_int8_gemm_sm90(const Int8GemmParams& params, int device, cudaStream_t stream);

}  // namespace effllm
