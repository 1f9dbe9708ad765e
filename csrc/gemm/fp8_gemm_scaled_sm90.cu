// fp8_gemm whose sums of 128 columns are scaled and added in fp32: its kernels (fp8_gemm_sm90.cuh).
#include "gemm/fp8_gemm_sm90.cuh"

namespace effllm {

void launch_fp8_gemm_scaled(const Fp8GemmParams& params, const SsGemmChoice& plan,
                            cudaStream_t stream) {
  launch_fp8_wgmma<Fp8Summation::kScaled>(params, plan, stream);
}

Fp8GemmResidency fp8_gemm_residency_scaled() {
  return fp8_wgmma_residency<Fp8Summation::kScaled>();
}

}  // namespace effllm
