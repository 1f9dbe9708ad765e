// int4_gemm on wgmma: the host side of int4_gemm_sm90.cu, for code compiled for any architecture.
#pragma once

#include <cuda_runtime.h>

#include <optional>

#include "gemm/int4_gemm.h"

namespace effllm {

// Tokens of a CTA, and how many CTAs of a cluster share the work along K.
struct Int4GemmSm90Config {
  int tokens, k_slices;
};

// None if the kernel does not take these shapes: groups of 32, rows of x that TMA cannot read, or
// more groups than fit into shared memory.
std::optional<Int4GemmSm90Config> select_int4_gemm_sm90_config(const Int4GemmParams& params,
                                                               int num_sms);

void launch_int4_gemm_sm90(const Int4GemmParams& params, Int4GemmSm90Config config,
                           cudaStream_t stream);

}  // namespace effllm
