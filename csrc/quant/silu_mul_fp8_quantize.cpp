// silu_mul_fp8_quantize: schema and CPU implementation.
#include "quant/silu_mul_fp8_quantize.h"

#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor> silu_mul_fp8_quantize_cpu(const Tensor& gate, const Tensor& up,
                                                     const std::optional<Tensor>& scale,
                                                     std::optional<int64_t> group_size) {
  SiluMulParams params = check_silu_mul_fp8_quantize(as_view(gate, "gate"), as_view(up, "up"),
                                                     as_view(scale, "scale"), group_size);
  const Tensor gate_rows = as_rows(gate), up_rows = as_rows(up);
  params.gate = strided_rows(as_view(gate_rows, "gate"));
  params.up = strided_rows(as_view(up_rows, "up"));
  CodeRows& rows = params.rows;
  Tensor codes = new_empty_as(gate, DType::kFloat8E4M3);
  Tensor scales = scale ? new_empty(gate, {1}, DType::kFloat32)
                        : new_scales_of_rows(gate, rows.num_groups, rows.stride_scales_group);
  rows.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  rows.scales = static_cast<float*>(scales.mutable_data_ptr());
  dispatch_float(rows.dtype, [&](auto element) {
    using T = decltype(element);
    quantize_made_rows<E4M3Codes, T>(rows, TorchThreads(), [&](int64_t row, T* y) {
      silu_mul_row(static_cast<const T*>(params.gate.data) + row * params.gate.stride,
                   static_cast<const T*>(params.up.data) + row * params.up.stride, rows.k, y);
    });
  });
  return {codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "silu_mul_fp8_quantize(Tensor gate, Tensor up, Tensor? scale=None, *, int? group_size=None)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("silu_mul_fp8_quantize", TORCH_BOX(&silu_mul_fp8_quantize_cpu));
}

}  // namespace effllm
