// int8_weight_gemm for few tokens on Hopper: the kernels of byte_weight_gemm_direct_sm90.cuh.
#include "gemm/byte_weight_gemm_direct_launch_sm90.cuh"

namespace effllm {

bool launch_int8_weight_gemm_direct_sm90(const Fp8GemmParams& params, int device,
                                         cudaStream_t stream) {
  return launch_byte_weight_gemm_direct<Int8Dequant>("int8_weight_gemm", params, device, stream);
}

}  // namespace effllm
