// fp8_weight_gemm: schema and CPU implementation.
#include "gemm/fp8_weight_gemm.h"

#include "common/dispatch.h"
#include "common/torch.h"
#include "gemm/byte_weight_gemm_cpu.h"

namespace effllm {
namespace {

Tensor fp8_weight_gemm_cpu(const Tensor& x, const Tensor& weight, const Tensor& w_scales,
                           const std::optional<Tensor>& bias) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Fp8GemmParams params =
      check_fp8_weight_gemm(as_view(x_rows, "x"), as_view(weight, "weight"),
                            as_view(w_scales, "w_scales"), as_view(bias, "bias"));
  Tensor out = new_empty_like_rows(x, params.n);
  params.out = out.mutable_data_ptr();
  dispatch_float(params.dtype, [&](auto element) {
    multiply_byte_weight<decltype(element), E4M3Weights>(params, TorchThreads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("fp8_weight_gemm(Tensor x, Tensor weight, Tensor w_scales, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("fp8_weight_gemm", TORCH_BOX(&fp8_weight_gemm_cpu));
}

}  // namespace effllm
