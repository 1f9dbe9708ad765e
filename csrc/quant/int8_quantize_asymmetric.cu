// int8_quantize_asymmetric on CUDA.
#include <tuple>

#include "common/torch.h"
#include "quant/code_rows_launch.cuh"
#include "quant/int8_quantize_asymmetric.cuh"

namespace effllm {
namespace {

std::tuple<Tensor, Tensor, Tensor> int8_quantize_asymmetric_cuda(const Tensor& x) {
  AsymmetricRowsParams params = check_int8_quantize_asymmetric(as_view(x, "x"));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  auto [codes, scales] = new_codes_of_rows(x, DType::kInt8, params.rows);
  Tensor zeros = new_empty_like_rows(x, 1, DType::kInt8);
  params.zeros = static_cast<int8_t*>(zeros.mutable_data_ptr());
  launch_rows("int8_quantize_asymmetric", params.rows, asymmetric_rows_launch(params),
              current_cuda_stream(x), [&](const Launch& launch, auto element, auto slots) {
                launch(int8_quantize_asymmetric_kernel<decltype(element), slots()>, params);
              });
  return {codes, scales, zeros};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("int8_quantize_asymmetric", TORCH_BOX(&int8_quantize_asymmetric_cuda));
}

}  // namespace effllm
