#include "common/dispatch.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "gemm/fp8_gemm.h"
#include "gemm/fp8_gemm_sm80.cuh"
#include "gemm/fp8_gemm_sm90.h"

namespace effllm {
namespace {

constexpr const char* kOp = "fp8_gemm";

// The scales of x [M, groups] in the layout in which kernels read them fastest, a float32 copy.
Tensor scales_by_group(const Tensor& x_scale_rows, int64_t m, int64_t k) {
  const int64_t groups = ceil_div(k, kFp8GroupSize);
  Tensor memory = new_empty(x_scale_rows, {groups, round_up<int64_t>(m, 4)}, DType::kFloat32);
  Tensor by_row = torch::stable::transpose(torch::stable::narrow(memory, 1, 0, m), 0, 1);
  torch::stable::copy_(by_row, x_scale_rows);
  return by_row;
}

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
  const int device = x.get_device_index();
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp) == 9 &&
      takes_fp8_gemm_sm90(params, accurate)) {
    Tensor scales = x_scale_rows;  // kept until the kernel is on its stream
    if (params.grouped() && !takes_fp8_group_scales_sm90(params.x_scales, params.m)) {
      scales = scales_by_group(x_scale_rows, params.m, params.k);
      params.x_scales = {scales.const_data_ptr(), DType::kFloat32, 1, scales.stride(1), 0, true};
    }
    launch_fp8_gemm_sm90(params, accurate, device, stream);
    return out;
  }
  dispatch_float(params.out_dtype, [&](auto element) {
    launch_strip_gemm_sm80<Fp8Operands<float8_e4m3, decltype(element)>>(kOp, params, stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("fp8_gemm", TORCH_BOX(&fp8_gemm_cuda)); }

}  // namespace effllm
