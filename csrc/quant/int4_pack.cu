// Roofline: bytes. K * N codes are read and half as many written, once per weight at load time, so
// a thread per word suffices: its eight bytes come from four rows' cache lines, shared by
// neighbours.
#include "common/torch.h"
#include "cuda/launch.h"
#include "quant/int4_pack.h"

namespace effllm {
namespace {

__global__ void int4_pack_kernel(const __grid_constant__ Int4PackParams params) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t strip = index / params.strip_words();
  if (strip >= params.num_strips()) return;
  params.qweight[index] =
      static_cast<int32_t>(int4_pack_word(params, strip, index % params.strip_words()));
}

Tensor int4_pack_cuda(const Tensor& codes) {
  torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  Int4PackParams params = check_int4_pack(as_view(codes, "codes"));
  Tensor qweight = new_empty(codes, {params.num_strips(), params.strip_words()}, DType::kInt32);
  params.qweight = static_cast<int32_t*>(qweight.mutable_data_ptr());
  if (qweight.numel() == 0) return qweight;

  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(qweight.numel(), kThreads));
  const Launch launch{"int4_pack", dim3(blocks), dim3(kThreads), 0, current_cuda_stream(codes)};
  launch(int4_pack_kernel, params);
  return qweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("int4_pack", TORCH_BOX(&int4_pack_cuda)); }

}  // namespace effllm
