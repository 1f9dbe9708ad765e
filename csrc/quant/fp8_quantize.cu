// fp8_quantize on CUDA: chooses the launch; fp8_quantize.cuh has the kernel.
#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "quant/fp8_quantize.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "fp8_quantize";

void launch(const Fp8QuantizeParams& params, cudaStream_t stream) {
  const Fp8Rows& rows = params.rows;
  const RowsLaunch grid = fp8_quantize_launch(params);
  if (grid.blocks == 0) return;
  check_rows_launch(kOp, rows, grid);
  const Launch launch{kOp, dim3(static_cast<unsigned>(grid.blocks)),
                      dim3(static_cast<unsigned>(grid.threads)), 0, stream};
  dispatch_float(rows.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_slots<T>(grid.slots, [&](auto slots) {
      launch(fp8_quantize_kernel<T, slots()>, Fp8QuantizeKernelParams{params, grid.pieces});
    });
  });
}

std::tuple<Tensor, Tensor> fp8_quantize_cuda(const Tensor& x, std::optional<int64_t> group_size) {
  Fp8QuantizeParams params = check_fp8_quantize(as_view(x, "x"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = as_rows(x);
  params.x = strided_rows(as_view(x_rows, "x"));
  Fp8Rows& rows = params.rows;
  Tensor codes = new_empty_as(x, DType::kFloat8E4M3);
  Tensor scales = new_scales_of_rows(x, rows.num_groups, rows.stride_scales_group);
  rows.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  rows.scales = static_cast<float*>(scales.mutable_data_ptr());
  launch(params, current_cuda_stream(x));
  return {codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("fp8_quantize", TORCH_BOX(&fp8_quantize_cuda));
}

}  // namespace effllm
