#include "common/torch.h"
#include "cuda/launch.h"
#include "gemm/w4a8_gemm.h"
#include "gemm/w4a8_gemm_sm80.cuh"
#include "gemm/w4a8_gemm_sm90.h"

namespace effllm {
namespace {

constexpr const char* kOp = "w4a8_gemm";

Tensor w4a8_gemm_cuda(const Tensor& x, const Tensor& x_scales, const Tensor& qweight,
                      const Tensor& scales, const std::optional<Tensor>& zeros,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& multipliers,
                      int64_t group_size, torch::headeronly::ScalarType out_dtype) {
  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor x_scale_rows = flatten_rows(x_scales);
  W4A8GemmParams params = check_w4a8_gemm(
      as_view(x_rows, "x"), {as_view(x_scales, "x_scales"), as_view(x_scale_rows, "x_scales")},
      as_view(qweight, "qweight"), as_view(scales, "scales"), as_view(zeros, "zeros"),
      as_view(bias, "bias"), as_view(multipliers, "multipliers"), group_size, as_dtype(out_dtype));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n, params.out_dtype);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();

  const cudaStream_t stream = current_cuda_stream(x);
  const int device = x.get_device_index();
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp) == 9 &&
      takes_w4a8_gemm_sm90(params)) {
    launch_w4a8_gemm_sm90(params, device, stream);
  } else {
    launch_w4a8_gemm_sm80(kOp, params, stream);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("w4a8_gemm", TORCH_BOX(&w4a8_gemm_cuda)); }

}  // namespace effllm
