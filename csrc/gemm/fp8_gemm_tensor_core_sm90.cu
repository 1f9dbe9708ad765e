// fp8_gemm whose sums of 128 columns stay in the tensor core: its kernels (fp8_gemm_sm90.cuh).
#include "gemm/fp8_gemm_sm90.cuh"

namespace effllm {

void launch_fp8_gemm_tensor_core(const Fp8GemmParams& params, const SsGemmChoice& plan,
                                 cudaStream_t stream) {
  launch_fp8_wgmma<Fp8Summation::kTensorCore>(params, plan, stream);
}

Fp8GemmResidency fp8_gemm_residency_tensor_core() {
  return fp8_wgmma_residency<Fp8Summation::kTensorCore>();
}

}  // namespace effllm
