#include "common/torch.h"
#include "cuda/launch.h"
#include "gemm/dense_gemm.h"
#include "gemm/dense_gemm_sm90.h"

namespace effllm {
namespace {

constexpr const char* kOp = "dense_gemm";
constexpr int64_t kAlignment = 16;  // bytes, of every row that TMA reads or writes

void check_device(int device) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp);
  if (major == 9) return;
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device, kOp);
  fail(kOp, "x must be on a GPU of compute capability 9.0, got " + std::to_string(major) + "." +
                std::to_string(minor));
}

Tensor dense_gemm_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor x_rows = torch::stable::contiguous(x);
  const View weight_view = as_view(weight, "weight");
  DenseGemmParams params =
      check_dense_gemm(as_view(x_rows, "x"), weight_view, as_view(bias, "bias"));
  check_device(x.get_device_index());
  if (params.n % 8 != 0 || params.k % 8 != 0 || params.k == 0) {
    fail(kOp, "weight must be [N, K] with multiples of 8 on a GPU, got [" +
                  std::to_string(params.n) + ", " + std::to_string(params.k) + "]");
  }
  Match(kOp, weight_view).aligned(kAlignment, 2);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  if (reinterpret_cast<uintptr_t>(params.x) % kAlignment != 0) {
    x_rows = torch::stable::clone(x_rows);
    params.x = x_rows.const_data_ptr();
  }

  launch_dense_gemm_sm90(params, x.get_device_index(), current_cuda_stream(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("dense_gemm", TORCH_BOX(&dense_gemm_cuda)); }

}  // namespace effllm
