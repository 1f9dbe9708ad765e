// silu_mul_fp8_quantize on CUDA: chooses the launch; code_rows.cuh has the kernel's parts.
#include <optional>
#include <tuple>

#include "common/torch.h"
#include "quant/code_rows_launch.cuh"
#include "quant/silu_mul_fp8_quantize.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "silu_mul_fp8_quantize";

void launch(const SiluMulParams& params, cudaStream_t stream) {
  const RowsLaunch grid = silu_mul_launch(params);
  launch_rows(kOp, params.rows, grid, stream, [&](const Launch& launch, auto element, auto slots) {
    launch(silu_mul_fp8_quantize_kernel<decltype(element), slots()>,
           SiluMulKernelParams{params, grid.pieces});
  });
}

std::tuple<Tensor, Tensor> silu_mul_fp8_quantize_cuda(const Tensor& gate, const Tensor& up,
                                                      const std::optional<Tensor>& scale,
                                                      std::optional<int64_t> group_size) {
  SiluMulParams params = check_silu_mul_fp8_quantize(as_view(gate, "gate"), as_view(up, "up"),
                                                     as_view(scale, "scale"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  const Tensor gate_rows = as_rows(gate), up_rows = as_rows(up);
  params.gate = strided_rows(as_view(gate_rows, "gate"));
  params.up = strided_rows(as_view(up_rows, "up"));
  CodeRows& rows = params.rows;
  Tensor codes = new_empty_as(gate, DType::kFloat8E4M3);
  Tensor scales = scale ? new_empty(gate, {1}, DType::kFloat32)
                        : new_scales_of_rows(gate, rows.num_groups, rows.stride_scales_group);
  rows.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  rows.scales = static_cast<float*>(scales.mutable_data_ptr());
  launch(params, current_cuda_stream(gate));
  return {codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("silu_mul_fp8_quantize", TORCH_BOX(&silu_mul_fp8_quantize_cuda));
}

}  // namespace effllm
