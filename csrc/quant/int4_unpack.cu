// Roofline: bytes. N * K codes are written and half as many read; one thread per code keeps the
// writes coalesced, and the words that 64 threads share come from L1.
#include "common/torch.h"
#include "cuda/launch.h"
#include "quant/int4_unpack.h"

namespace effllm {
namespace {

__global__ void int4_unpack_kernel(const __grid_constant__ Int4UnpackParams params) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= params.n * params.k) return;
  params.codes[index] = int4_unpack_code(params, index / params.k, index % params.k);
}

Tensor int4_unpack_cuda(const Tensor& qweight, int64_t n, int64_t k) {
  torch::stable::accelerator::DeviceGuard guard(qweight.get_device_index());
  Int4UnpackParams params = check_int4_unpack(as_view(qweight, "qweight"), n, k);
  Tensor codes = new_empty(qweight, {n, k}, DType::kUInt8);
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  if (codes.numel() == 0) return codes;

  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(codes.numel(), kThreads));
  const Launch launch{"int4_unpack", dim3(blocks), dim3(kThreads), 0, current_cuda_stream(qweight)};
  launch(int4_unpack_kernel, params);
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack_cuda));
}

}  // namespace effllm
