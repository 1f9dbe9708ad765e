// int8_quantize_asymmetric: schema and CPU implementation.
#include "quant/int8_quantize_asymmetric.h"

#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"
#include "quant/int8_layout.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor, Tensor> int8_quantize_asymmetric_cpu(const Tensor& x) {
  AsymmetricRowsParams params = check_int8_quantize_asymmetric(as_view(x, "x"));
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  CodeRows& rows = params.rows;
  auto [codes, scales] = new_codes_of_rows(x, DType::kInt8, rows);
  Tensor zeros = new_empty_like_rows(x, 1, DType::kInt8);
  params.zeros = static_cast<int8_t*>(zeros.mutable_data_ptr());

  dispatch_float(rows.dtype, [&](auto element) {
    const auto* first = static_cast<const decltype(element)*>(params.x.data);
    const int64_t grain = ceil_div(kElementsPerThread, rows.k + 1);
    TorchThreads().for_each(rows.m, grain, [&](int64_t row) {
      const auto* x_row = first + row * params.x.stride;
      const auto found = AsymmetricInt8Codes::of(int8_range(x_row, rows.k));
      found.encode(x_row, rows.k, rows.codes + row * rows.k);
      rows.scales[row] = found.scale;
      params.zeros[row] = static_cast<int8_t>(found.zero);
    });
  });
  return {codes, scales, zeros};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("int8_quantize_asymmetric(Tensor x) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("int8_quantize_asymmetric", TORCH_BOX(&int8_quantize_asymmetric_cpu));
}

}  // namespace effllm
