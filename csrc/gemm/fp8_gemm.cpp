// fp8_gemm: schema and CPU implementation.
#include "gemm/fp8_gemm.h"

#include "common/dispatch.h"
#include "common/torch.h"
#include "gemm/fp8_gemm_cpu.h"

namespace effllm {
namespace {

// `accurate` allows less than fp32 sums where it is false; there are none here.
Tensor fp8_gemm_cpu(const Tensor& x, const Tensor& x_scales, const Tensor& weight,
                    const Tensor& w_scales, const std::optional<Tensor>& bias,
                    torch::headeronly::ScalarType out_dtype, bool accurate) {
  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor x_scale_rows = flatten_rows(x_scales);
  Fp8GemmParams params =
      check_fp8_gemm(as_view(x_rows, "x"), as_view(x_scales, "x_scales"),
                     as_view(x_scale_rows, "x_scales"), as_view(weight, "weight"),
                     as_view(w_scales, "w_scales"), as_view(bias, "bias"), as_dtype(out_dtype));
  Tensor out = new_empty_like_rows(x, params.n, params.out_dtype);
  params.out = out.mutable_data_ptr();
  dispatch_float(params.out_dtype, [&](auto element) {
    multiply_fp8<float8_e4m3, decltype(element)>(params, TorchThreads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "fp8_gemm(Tensor x, Tensor x_scales, Tensor weight, Tensor w_scales, Tensor? bias=None, *, "
      "ScalarType out_dtype, bool accurate=True) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("fp8_gemm", TORCH_BOX(&fp8_gemm_cpu)); }

}  // namespace effllm
