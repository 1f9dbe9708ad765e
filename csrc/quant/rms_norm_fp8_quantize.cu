// rms_norm_fp8_quantize on CUDA: chooses the launch; rms_norm_fp8_quantize.cuh has the kernel.
#include <optional>
#include <tuple>

#include "common/torch.h"
#include "quant/code_rows_launch.cuh"
#include "quant/rms_norm_fp8_quantize.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "rms_norm_fp8_quantize";

void launch(const RmsNormParams& params, cudaStream_t stream) {
  const RowsLaunch grid = rms_norm_launch(params);
  launch_rows(kOp, params.rows, grid, stream, [&](const Launch& launch, auto element, auto slots) {
    launch(rms_norm_fp8_quantize_kernel<decltype(element), slots(), false>, params);
  });
}

std::tuple<Tensor, Tensor> rms_norm_fp8_quantize_cuda(const Tensor& x, const Tensor& weight,
                                                      const std::optional<Tensor>& scale,
                                                      double eps,
                                                      std::optional<int64_t> group_size) {
  RmsNormParams params =
      check_rms_norm_fp8_quantize(kOp, as_view(x, "x"), std::nullopt, as_view(weight, "weight"),
                                  as_view(scale, "scale"), eps, group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  CodeRows& rows = params.rows;
  Tensor codes = new_empty_as(x, DType::kFloat8E4M3);
  Tensor scales = scale ? new_empty(x, {1}, DType::kFloat32)
                        : new_scales_of_rows(x, rows.num_groups, rows.stride_scales_group);
  rows.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  rows.scales = static_cast<float*>(scales.mutable_data_ptr());
  launch(params, current_cuda_stream(x));
  return {codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("rms_norm_fp8_quantize", TORCH_BOX(&rms_norm_fp8_quantize_cuda));
}

}  // namespace effllm
