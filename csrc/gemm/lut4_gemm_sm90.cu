// Which kernel lut4_gemm takes on Hopper: host code alone.
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "gemm/lut4_gemm_sm90.h"

namespace effllm {

bool launch_lut4_gemm_sm90(const Lut4GemmParams& params, int device, cudaStream_t stream) {
  const bool group_codebooks = params.stride_codebook_g != 0 && params.num_groups > 1;
  if (group_codebooks || params.k == 0 || params.k % 8 != 0 ||
      reinterpret_cast<uintptr_t>(params.x) % 16 != 0) {
    return false;
  }
  const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device, "lut4_gemm");
  if (params.m <= 8 && launch_lut4_gemm_direct_sm90(params, num_sms, stream)) return true;
  // Whole stages: what lies behind a K between them would be looked up, and a codebook entry may be
  // no number.
  constexpr int kStageK = 256;
  constexpr int kMaxTokens = 64;
  if (params.k % kStageK != 0 || params.m > kMaxTokens ||
      (params.group_size < kPackedGemmNarrowTileK && params.num_groups > 1)) {
    return false;
  }
  static PerDevice<PackedGemmNarrowResidency> residency;
  const auto plan =
      plan_packed_gemm_narrow(params, num_sms, residency.get(device, lut4_gemm_narrow_residency));
  if (plan) launch_lut4_gemm_narrow_sm90(params, *plan, stream);
  return plan.has_value();
}

}  // namespace effllm
