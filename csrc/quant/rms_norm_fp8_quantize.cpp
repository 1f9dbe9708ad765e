// rms_norm_fp8_quantize: schema and CPU implementation; rms_norm_rows.h is its contract.
#include <tuple>

#include "common/torch.h"
#include "quant/fp8_layout.h"
#include "quant/rms_norm_rows.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor> rms_norm_fp8_quantize_cpu(const Tensor& x, const Tensor& weight,
                                                     const std::optional<Tensor>& scale, double eps,
                                                     std::optional<int64_t> group_size) {
  RmsNormParams params =
      check_rms_norm_rows("rms_norm_fp8_quantize", as_view(x, "x"), std::nullopt,
                          as_view(weight, "weight"), as_view(scale, "scale"), eps, group_size);
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  auto results = new_codes_of_rows(x, DType::kFloat8E4M3, params.rows);
  quantize_rms_norm_rows<E4M3Codes>(params, TorchThreads());
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "rms_norm_fp8_quantize(Tensor x, Tensor weight, Tensor? scale=None, *, float eps, "
      "int? group_size=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("rms_norm_fp8_quantize", TORCH_BOX(&rms_norm_fp8_quantize_cpu));
}

}  // namespace effllm
