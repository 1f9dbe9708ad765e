// w4a8_gemm on wgmma with groups of 128 columns: a stage each, whose sum is scaled.
// What bounds the kernel is said in w4a8_gemm_sm90.cuh.
#include "gemm/w4a8_gemm_launch_sm90.cuh"

namespace effllm {

void launch_w4a8_gemm_group128_sm90(const W4A8GemmParams& params, int device, cudaStream_t stream) {
  launch_w4a8_gemm<4>(params, device, stream);
}

}  // namespace effllm
