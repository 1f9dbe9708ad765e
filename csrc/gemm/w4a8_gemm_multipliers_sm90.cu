// w4a8_gemm on wgmma with multipliers: sums are exact, as with one group.
// What bounds the kernel is said in w4a8_gemm_sm90.cuh.
#include "gemm/w4a8_gemm_launch_sm90.cuh"

namespace effllm {

void launch_w4a8_gemm_multipliers_sm90(const W4A8GemmParams& params, int device,
                                       cudaStream_t stream) {
  constexpr auto kMultipliers = W4A8Decoding::kMultipliers;
  if (params.multipliers.group_size == 32) {
    W4A8Kernels<1, kMultipliers>::launch(params, device, stream);
  } else if (params.multipliers.group_size == 64) {
    W4A8Kernels<2, kMultipliers>::launch(params, device, stream);
  } else {
    W4A8Kernels<4, kMultipliers>::launch(params, device, stream);
  }
}

}  // namespace effllm
