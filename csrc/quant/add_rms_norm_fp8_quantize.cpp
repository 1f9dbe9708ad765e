// add_rms_norm_fp8_quantize: schema and CPU implementation; rms_norm_fp8_quantize.h is its
// contract.
#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"
#include "quant/rms_norm_fp8_quantize.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fp8_quantize_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& weight,
    const std::optional<Tensor>& scale, double eps, std::optional<int64_t> group_size) {
  RmsNormParams params = check_rms_norm_fp8_quantize(
      "add_rms_norm_fp8_quantize", as_view(x, "x"), as_view(residual, "residual"),
      as_view(weight, "weight"), as_view(scale, "scale"), eps, group_size);
  const Tensor x_rows = as_rows(x), residual_rows = as_rows(residual);
  params.x = strided_rows(as_view(x_rows, "x"));
  params.residual = strided_rows(as_view(residual_rows, "residual"));
  CodeRows& rows = params.rows;
  Tensor residual_out = new_empty_as(x, rows.dtype);
  Tensor codes = new_empty_as(x, DType::kFloat8E4M3);
  Tensor scales = scale ? new_empty(x, {1}, DType::kFloat32)
                        : new_scales_of_rows(x, rows.num_groups, rows.stride_scales_group);
  params.residual_out = residual_out.mutable_data_ptr();
  rows.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  rows.scales = static_cast<float*>(scales.mutable_data_ptr());
  dispatch_float(rows.dtype, [&](auto element) {
    using T = decltype(element);
    quantize_made_rows<E4M3Codes, T>(rows, TorchThreads(),
                                     [&](int64_t row, T* y) { rms_norm_row(params, row, y); });
  });
  return {codes, scales, residual_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "add_rms_norm_fp8_quantize(Tensor x, Tensor residual, Tensor weight, Tensor? scale=None, *, "
      "float eps, int? group_size=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("add_rms_norm_fp8_quantize", TORCH_BOX(&add_rms_norm_fp8_quantize_cpu));
}

}  // namespace effllm
