// silu_mul_fp8_quantize on CUDA; silu_mul_rows.cuh has the kernel.
#include <optional>
#include <tuple>

#include "common/torch.h"
#include "quant/fp8_encode.cuh"
#include "quant/silu_mul_rows_launch.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "silu_mul_fp8_quantize";

std::tuple<Tensor, Tensor> silu_mul_fp8_quantize_cuda(const Tensor& gate, const Tensor& up,
                                                      const std::optional<Tensor>& scale,
                                                      std::optional<int64_t> group_size) {
  SiluMulParams params = check_silu_mul_rows(kOp, as_view(gate, "gate"), as_view(up, "up"),
                                             as_view(scale, "scale"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  const Tensor gate_rows = as_rows(gate), up_rows = as_rows(up);
  params.gate = strided_rows(as_view(gate_rows, "gate"));
  params.up = strided_rows(as_view(up_rows, "up"));
  auto results = new_codes_of_rows(gate, DType::kFloat8E4M3, params.rows);
  launch_silu_mul_rows<E4m3Scale>(kOp, params, current_cuda_stream(gate));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("silu_mul_fp8_quantize", TORCH_BOX(&silu_mul_fp8_quantize_cuda));
}

}  // namespace effllm
