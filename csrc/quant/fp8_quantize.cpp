// fp8_quantize: schema and CPU implementation.
#include "quant/fp8_quantize.h"

#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor> fp8_quantize_cpu(const Tensor& x, std::optional<int64_t> group_size) {
  QuantizeRowsParams params = check_fp8_quantize(as_view(x, "x"), group_size);
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  CodeRows& rows = params.rows;
  auto results = new_codes_of_rows(x, DType::kFloat8E4M3, rows);

  const int64_t grain = ceil_div(kElementsPerThread, rows.group_size + 1);
  dispatch_float(rows.dtype, [&](auto element) {
    const auto* first = static_cast<const decltype(element)*>(params.x.data);
    TorchThreads().for_each(rows.m * rows.num_groups, grain, [&](int64_t index) {
      const int64_t row = index / rows.num_groups;
      quantize_group<E4M3Codes>(rows, row, index % rows.num_groups, first + row * params.x.stride);
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("fp8_quantize(Tensor x, *, int? group_size=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("fp8_quantize", TORCH_BOX(&fp8_quantize_cpu));
}

}  // namespace effllm
