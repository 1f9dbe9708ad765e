// fp8_quantize on CUDA; quantize_rows.cuh has the kernel.
#include <optional>
#include <tuple>

#include "common/torch.h"
#include "quant/fp8_encode.cuh"
#include "quant/fp8_quantize.h"
#include "quant/quantize_rows_launch.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "fp8_quantize";

std::tuple<Tensor, Tensor> fp8_quantize_cuda(const Tensor& x, std::optional<int64_t> group_size) {
  QuantizeRowsParams params = check_fp8_quantize(as_view(x, "x"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  auto results = new_codes_of_rows(x, DType::kFloat8E4M3, params.rows);
  launch_quantize_rows<E4m3Scale>(kOp, params, current_cuda_stream(x));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("fp8_quantize", TORCH_BOX(&fp8_quantize_cuda));
}

}  // namespace effllm
