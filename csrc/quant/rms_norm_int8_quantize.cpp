// rms_norm_int8_quantize: schema and CPU implementation; rms_norm_rows.h is its contract.
#include <tuple>

#include "common/torch.h"
#include "quant/int8_layout.h"
#include "quant/rms_norm_rows.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor> rms_norm_int8_quantize_cpu(const Tensor& x, const Tensor& weight,
                                                      const std::optional<Tensor>& scale,
                                                      double eps) {
  RmsNormParams params =
      check_rms_norm_rows("rms_norm_int8_quantize", as_view(x, "x"), std::nullopt,
                          as_view(weight, "weight"), as_view(scale, "scale"), eps, std::nullopt);
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  auto results = new_codes_of_rows(x, DType::kInt8, params.rows);
  quantize_rms_norm_rows<Int8Codes>(params, TorchThreads());
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "rms_norm_int8_quantize(Tensor x, Tensor weight, Tensor? scale=None, *, float eps)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("rms_norm_int8_quantize", TORCH_BOX(&rms_norm_int8_quantize_cpu));
}

}  // namespace effllm
