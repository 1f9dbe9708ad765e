#include "common/dispatch.h"
#include "common/torch.h"
#include "gemm/fp8_gemm.h"
#include "gemm/fp8_gemm_sm80.cuh"

namespace effllm {
namespace {

// `accurate` allows less than fp32 sums where it is false; there are none here.
Tensor fp8_gemm_cuda(const Tensor& x, const Tensor& x_scales, const Tensor& weight,
                     const Tensor& w_scales, const std::optional<Tensor>& bias,
                     torch::headeronly::ScalarType out_dtype, bool accurate) {
  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor x_scale_rows = flatten_rows(x_scales);
  Fp8GemmParams params =
      check_fp8_gemm(as_view(x_rows, "x"), as_view(x_scales, "x_scales"),
                     as_view(x_scale_rows, "x_scales"), as_view(weight, "weight"),
                     as_view(w_scales, "w_scales"), as_view(bias, "bias"), as_dtype(out_dtype));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n, params.out_dtype);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();

  const cudaStream_t stream = current_cuda_stream(x);
  dispatch_float(params.out_dtype, [&](auto element) {
    launch_strip_gemm_sm80<Fp8Operands<float8_e4m3, decltype(element)>>("fp8_gemm", params, stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("fp8_gemm", TORCH_BOX(&fp8_gemm_cuda)); }

}  // namespace effllm
