#include <utility>

#include "common/torch.h"
#include "gemm/int4_gemm.h"
#include "gemm/int4_gemm_sm80.cuh"
#include "gemm/int4_gemm_sm90.h"

namespace effllm {
namespace {

// Row `index` of kInt4GemmConfigs, compiled: the table is the one list of what exists.
template <class InT, size_t... kIndices>
void launch_config(int index, const Int4GemmParams& params, cudaStream_t stream,
                   std::index_sequence<kIndices...>) {
  ((index == kIndices
        ? launch_int4_gemm<Int4GemmSm80<InT, kInt4GemmConfigs[kIndices].token_tiles,
                                        kInt4GemmConfigs[kIndices].k_slices>>(params, stream)
        : void()),
   ...);
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "int4_gemm", "device query");
  return value;
}

// The wgmma kernel where the GPU has it and it takes the shapes, else the one that takes all.
void launch(const Int4GemmParams& params, int device, cudaStream_t stream) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9) {
    const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device);
    if (const auto config = select_int4_gemm_sm90_config(params, num_sms)) {
      return launch_int4_gemm_sm90(params, *config, stream);
    }
  }
  const int config = select_int4_gemm_config(params.m);
  constexpr std::make_index_sequence<kInt4GemmConfigs.size()> kConfigIndices;
  if (params.dtype == DType::kFloat16) {
    launch_config<float16>(config, params, stream, kConfigIndices);
  } else {
    launch_config<bfloat16>(config, params, stream, kConfigIndices);
  }
}

Tensor int4_gemm_cuda(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                      const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                      int64_t group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Int4GemmParams params =
      check_int4_gemm(as_view(x_rows, "x"), as_view(qweight, "qweight"), as_view(scales, "scales"),
                      as_view(zeros, "zeros"), as_view(bias, "bias"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();

  launch(params, x.get_device_index(), current_cuda_stream(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("int4_gemm", TORCH_BOX(&int4_gemm_cuda)); }

}  // namespace effllm
