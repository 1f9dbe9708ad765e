// add_rms_norm_fp8_quantize on CUDA; rms_norm_rows.cuh has the kernel.
#include <optional>
#include <tuple>

#include "common/torch.h"
#include "quant/fp8_encode.cuh"
#include "quant/rms_norm_rows_launch.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "add_rms_norm_fp8_quantize";

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fp8_quantize_cuda(
    const Tensor& x, const Tensor& residual, const Tensor& weight,
    const std::optional<Tensor>& scale, double eps, std::optional<int64_t> group_size) {
  RmsNormParams params =
      check_rms_norm_rows(kOp, as_view(x, "x"), as_view(residual, "residual"),
                          as_view(weight, "weight"), as_view(scale, "scale"), eps, group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = as_rows(x), residual_rows = as_rows(residual);
  params.x = strided_rows(as_view(x_rows, "x"));
  params.residual = strided_rows(as_view(residual_rows, "residual"));
  auto [codes, scales] = new_codes_of_rows(x, DType::kFloat8E4M3, params.rows);
  Tensor residual_out = new_empty_as(x, params.rows.dtype);
  params.residual_out = residual_out.mutable_data_ptr();
  launch_rms_norm_rows<E4m3Scale, true>(kOp, params, current_cuda_stream(x));
  return {codes, scales, residual_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("add_rms_norm_fp8_quantize", TORCH_BOX(&add_rms_norm_fp8_quantize_cuda));
}

}  // namespace effllm
