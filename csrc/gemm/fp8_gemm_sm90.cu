// Which kernel fp8_gemm takes on Hopper: host code alone. What bounds the kernels stands in
// ss_gemm_sm90.cuh.
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "gemm/fp8_gemm_sm90.h"

namespace effllm {

bool takes_fp8_gemm_sm90(const Fp8GemmParams& params, bool accurate) {
  return !(accurate && params.out_dtype == DType::kFloat32) && takes_8bit_ss_gemm(params);
}

bool takes_fp8_group_scales_sm90(const Fp8Scales& scales, int64_t m) {
  return scales.grouped && scales.dtype == DType::kFloat32 && (m == 1 || scales.stride_row == 1) &&
         scales.stride_group % 4 == 0 && reinterpret_cast<uintptr_t>(scales.data) % 16 == 0;
}

SsGemmChoice plan_fp8_gemm(const Fp8GemmParams& params, Fp8Summation summation, int num_sms,
                           const Fp8GemmResidency& residency) {
  std::array<SsGemmCandidate, kFp8GemmShapes.size()> candidates;
  for (size_t index = 0; index < candidates.size(); ++index) {
    const Fp8GemmShape& shape = kFp8GemmShapes[index];
    candidates[index] = {shape.tile, shape.stage_time[static_cast<size_t>(summation)],
                         residency[index]};
  }
  return plan_ss_gemm({params.m, params.n, params.k, params.out_dtype}, candidates, num_sms);
}

void launch_fp8_gemm_sm90(const Fp8GemmParams& params, bool accurate, int device,
                          cudaStream_t stream) {
  const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device, "fp8_gemm");
  const auto run = [&](Fp8Summation summation, auto& known, auto residency, auto launch) {
    const Fp8GemmResidency resident = known.get(device, residency);
    launch(params, plan_fp8_gemm(params, summation, num_sms, resident), stream);
  };
  const bool is_short = params.out_dtype == DType::kBFloat16 && params.k <= kFp8BFloat16Columns;
  if (params.grouped()) {
    static PerDevice<Fp8GemmResidency> known;
    run(Fp8Summation::kScaled, known, fp8_gemm_residency_scaled, launch_fp8_gemm_scaled);
  } else if ((accurate && !is_short) || params.m <= 64) {  // few tokens leave the time for that
    static PerDevice<Fp8GemmResidency> known;
    run(Fp8Summation::kPlain, known, fp8_gemm_residency_plain, launch_fp8_gemm_plain);
  } else {
    static PerDevice<Fp8GemmResidency> known;
    run(Fp8Summation::kTensorCore, known, fp8_gemm_residency_tensor_core,
        launch_fp8_gemm_tensor_core);
  }
}

}  // namespace effllm
