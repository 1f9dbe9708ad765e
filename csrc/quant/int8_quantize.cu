// int8_quantize on CUDA; quantize_rows.cuh has the kernel.
#include <optional>
#include <tuple>

#include "common/torch.h"
#include "quant/int8_encode.cuh"
#include "quant/int8_quantize.h"
#include "quant/quantize_rows_launch.cuh"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor> int8_quantize_cuda(const Tensor& x, const std::optional<Tensor>& scale) {
  QuantizeRowsParams params = check_int8_quantize(as_view(x, "x"), as_view(scale, "scale"));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  auto results = new_codes_of_rows(x, DType::kInt8, params.rows);
  launch_quantize_rows<Int8Scale>("int8_quantize", params, current_cuda_stream(x));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize_cuda));
}

}  // namespace effllm
