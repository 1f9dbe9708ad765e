// What bounds the kernel is said in byte_weight_gemm_sm90.cuh.
#include "gemm/byte_weight_gemm_launch_sm90.cuh"

namespace effllm {

void launch_int8_weight_gemm_channel_sm90(const Fp8GemmParams& params, int device,
                                          cudaStream_t stream) {
  ByteWeightKernels<Int8Dequant, false>::launch("int8_weight_gemm", params, device, stream);
}

}  // namespace effllm
