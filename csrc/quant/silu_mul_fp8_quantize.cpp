// silu_mul_fp8_quantize: schema and CPU implementation; silu_mul_rows.h is its contract.
#include <tuple>

#include "common/torch.h"
#include "quant/fp8_layout.h"
#include "quant/silu_mul_rows.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor> silu_mul_fp8_quantize_cpu(const Tensor& gate, const Tensor& up,
                                                     const std::optional<Tensor>& scale,
                                                     std::optional<int64_t> group_size) {
  SiluMulParams params =
      check_silu_mul_rows("silu_mul_fp8_quantize", as_view(gate, "gate"), as_view(up, "up"),
                          as_view(scale, "scale"), group_size);
  const Tensor gate_rows = as_rows(gate), up_rows = as_rows(up);
  params.gate = strided_rows(as_view(gate_rows, "gate"));
  params.up = strided_rows(as_view(up_rows, "up"));
  auto results = new_codes_of_rows(gate, DType::kFloat8E4M3, params.rows);
  quantize_silu_mul_rows<E4M3Codes>(params, TorchThreads());
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "silu_mul_fp8_quantize(Tensor gate, Tensor up, Tensor? scale=None, *, int? "
      "group_size=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("silu_mul_fp8_quantize", TORCH_BOX(&silu_mul_fp8_quantize_cpu));
}

}  // namespace effllm
