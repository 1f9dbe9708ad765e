// int8_quantize: schema and CPU implementation.
#include "quant/int8_quantize.h"

#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"
#include "quant/int8_layout.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor> int8_quantize_cpu(const Tensor& x, const std::optional<Tensor>& scale) {
  QuantizeRowsParams params = check_int8_quantize(as_view(x, "x"), as_view(scale, "scale"));
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  CodeRows& rows = params.rows;
  auto results = new_codes_of_rows(x, DType::kInt8, rows);
  if (scale) *rows.scales = load_float(rows.given_scale, rows.given_scale_dtype, 0);

  dispatch_float(rows.dtype, [&](auto element) {
    const auto* first = static_cast<const decltype(element)*>(params.x.data);
    const int64_t grain = ceil_div(kElementsPerThread, rows.k + 1);
    TorchThreads().for_each(rows.m, grain, [&](int64_t row) {
      const auto* x_row = first + row * params.x.stride;
      if (scale) {
        Int8Codes::encode(x_row, rows.k, *rows.scales, rows.codes + row * rows.k);
      } else {
        quantize_group<Int8Codes>(rows, row, 0, x_row);
      }
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("int8_quantize(Tensor x, Tensor? scale=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize_cpu));
}

}  // namespace effllm
