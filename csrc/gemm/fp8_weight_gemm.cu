#include "common/dispatch.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "gemm/byte_weight_gemm_direct_sm90.h"
#include "gemm/byte_weight_gemm_sm90.h"
#include "gemm/fp8_gemm_sm80.cuh"
#include "gemm/fp8_weight_gemm.h"

namespace effllm {
namespace {

constexpr const char* kOp = "fp8_weight_gemm";

Tensor fp8_weight_gemm_cuda(const Tensor& x, const Tensor& weight, const Tensor& w_scales,
                            const std::optional<Tensor>& bias) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Fp8GemmParams params =
      check_fp8_weight_gemm(as_view(x_rows, "x"), as_view(weight, "weight"),
                            as_view(w_scales, "w_scales"), as_view(bias, "bias"));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();

  const cudaStream_t stream = current_cuda_stream(x);
  const int device = x.get_device_index();
  const bool is_hopper = device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp) == 9;
  if (is_hopper && launch_fp8_weight_gemm_direct_sm90(params, device, stream)) return out;
  if (is_hopper && launch_fp8_weight_gemm_sm90(params, device, stream)) return out;
  dispatch_16bit(params.dtype, [&](auto element) {
    using T = decltype(element);
    launch_strip_gemm_sm80<Fp8Operands<T, T>>(kOp, params, stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("fp8_weight_gemm", TORCH_BOX(&fp8_weight_gemm_cuda));
}

}  // namespace effllm
