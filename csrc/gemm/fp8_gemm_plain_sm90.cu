// fp8_gemm whose sums of 128 or 512 columns are added in fp32: its kernels (fp8_gemm_sm90.cuh).
#include "gemm/fp8_gemm_sm90.cuh"

namespace effllm {

void launch_fp8_gemm_plain(const Fp8GemmParams& params, const SsGemmChoice& plan,
                           cudaStream_t stream) {
  launch_fp8_wgmma<Fp8Summation::kPlain>(params, plan, stream);
}

Fp8GemmResidency fp8_gemm_residency_plain() { return fp8_wgmma_residency<Fp8Summation::kPlain>(); }

}  // namespace effllm
