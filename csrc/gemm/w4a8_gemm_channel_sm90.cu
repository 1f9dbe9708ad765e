// w4a8_gemm on wgmma with one group: sums are exact, and those of slices of K come together in
// int32. What bounds the kernel is said in w4a8_gemm_sm90.cuh.
#include "gemm/w4a8_gemm_launch_sm90.cuh"

namespace effllm {

void launch_w4a8_gemm_channel_sm90(const W4A8GemmParams& params, int device, cudaStream_t stream) {
  launch_w4a8_gemm<0>(params, device, stream);
}

}  // namespace effllm
