// rms_norm_int8_quantize on CUDA; rms_norm_rows.cuh has the kernel.
#include <optional>
#include <tuple>

#include "common/torch.h"
#include "quant/int8_encode.cuh"
#include "quant/rms_norm_rows_launch.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "rms_norm_int8_quantize";

std::tuple<Tensor, Tensor> rms_norm_int8_quantize_cuda(const Tensor& x, const Tensor& weight,
                                                       const std::optional<Tensor>& scale,
                                                       double eps) {
  RmsNormParams params =
      check_rms_norm_rows(kOp, as_view(x, "x"), std::nullopt, as_view(weight, "weight"),
                          as_view(scale, "scale"), eps, std::nullopt);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  auto results = new_codes_of_rows(x, DType::kInt8, params.rows);
  launch_rms_norm_rows<Int8Scale, false>(kOp, params, current_cuda_stream(x));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("rms_norm_int8_quantize", TORCH_BOX(&rms_norm_int8_quantize_cuda));
}

}  // namespace effllm
