#include "common/dispatch.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "gemm/int8_gemm.h"
#include "gemm/int8_gemm_sm80.cuh"
#include "gemm/int8_gemm_sm90.h"

namespace effllm {
namespace {

constexpr const char* kOp = "int8_gemm";

Tensor int8_gemm_cuda(const Tensor& x, const Tensor& x_scales, const Tensor& weight,
                      const Tensor& w_scales, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& x_zeros, const std::optional<Tensor>& w_sums,
                      torch::headeronly::ScalarType out_dtype) {
  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor x_scale_rows = flatten_rows(x_scales);
  const Tensor x_zero_rows = flatten_rows(x_zeros.value_or(x_scales));
  std::optional<Int8XValues> zeros;
  if (x_zeros) zeros = {as_view(*x_zeros, "x_zeros"), as_view(x_zero_rows, "x_zeros")};
  Int8GemmParams params = check_int8_gemm(
      as_view(x_rows, "x"), {as_view(x_scales, "x_scales"), as_view(x_scale_rows, "x_scales")},
      as_view(weight, "weight"), as_view(w_scales, "w_scales"), as_view(bias, "bias"), zeros,
      as_view(w_sums, "w_sums"), as_dtype(out_dtype));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n, params.out_dtype);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  std::optional<Tensor> found_sums;  // kept until the kernel is on its stream
  if (x_zeros && !w_sums) {
    found_sums = sum_of_rows(weight, DType::kInt32);
    params.w_sums = {found_sums->const_data_ptr(), DType::kInt32, 1};
  }

  const cudaStream_t stream = current_cuda_stream(x);
  const int device = x.get_device_index();
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp) == 9 &&
      takes_int8_gemm_sm90(params)) {
    launch_int8_gemm_sm90(params, device, stream);
    return out;
  }
  dispatch_float(params.out_dtype, [&](auto element) {
    launch_strip_gemm_sm80<Int8Operands<decltype(element)>>(kOp, params, stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("int8_gemm", TORCH_BOX(&int8_gemm_cuda)); }

}  // namespace effllm
