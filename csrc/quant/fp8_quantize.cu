// Roofline: bytes. x is read twice, the second time from L1 or L2, and one byte per element is
// written; the activations of a decoding step are so few that the launch is what it costs.
#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "quant/fp8_encode.cuh"
#include "quant/fp8_quantize.h"

namespace effllm {
namespace {

// kLanes threads per scale: 16, of which 8 elements each are a group of 128, or all of a block.
template <class T, int kLanes, int kVector>
__global__ void __launch_bounds__(kFp8Threads)
    fp8_quantize_kernel(const __grid_constant__ Fp8QuantizeParams params) {
  __shared__ int32_t warp_largest[kFp8Threads / 32];
  const int lane = threadIdx.x % kLanes;
  const int64_t index =
      int64_t{blockIdx.x} * (kFp8Threads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  // Lanes without a group stay for the shuffles, as a group of no columns.
  const bool valid = index < params.num_scales();
  const int64_t row = valid ? params.row(index) : 0;
  const int64_t columns = valid ? params.num_columns(index) : 0;
  const int64_t offset = valid ? row * params.k + params.first_column(index) : 0;
  const auto* x = static_cast<const device_t<T>*>(params.x) + offset;

  int32_t largest = 0;
  for (int64_t column = lane * kVector; column < columns; column += kLanes * kVector) {
    float values[kVector];
    load_floats<kVector>(x + column, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest = max(largest, magnitude_bits(values[i]));
  }
  if constexpr (kLanes == kFp8Threads) {
    largest = block_max(largest, warp_largest);
  } else {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
    }
  }
  const float scale = e4m3_scale(largest);
  if (valid && lane == 0) {
    params.scales[params.group(index) * params.stride_scales_group + row] = scale;
  }
  for (int64_t column = lane * kVector; column < columns; column += kLanes * kVector) {
    float values[kVector];
    load_floats<kVector>(x + column, values);
    store_codes<kVector>(values, scale, params.codes + offset + column);
  }
}

template <class T, int kLanes>
void launch_fp8_quantize(const Fp8QuantizeParams& params, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(params.num_scales(), kFp8Threads / kLanes);
  if (blocks > INT32_MAX) {
    fail("fp8_quantize",
         "x must have fewer than 2^31 rows on a GPU, got " + std::to_string(params.m));
  }
  const Launch launch{"fp8_quantize", dim3(static_cast<unsigned>(blocks)), dim3(kFp8Threads), 0,
                      stream};
  if (takes_vectors(params.x, params.k)) {
    launch(fp8_quantize_kernel<T, kLanes, 8>, params);
  } else {
    launch(fp8_quantize_kernel<T, kLanes, 1>, params);
  }
}

std::tuple<Tensor, Tensor> fp8_quantize_cuda(const Tensor& x, std::optional<int64_t> group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Fp8QuantizeParams params = check_fp8_quantize(as_view(x_rows, "x"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor codes = new_empty_as(x, DType::kFloat8E4M3);
  Tensor scales = new_empty(x, {params.num_groups, params.stride_scales_group}, DType::kFloat32);
  if (params.num_scales() > 0) {
    params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
    params.scales = static_cast<float*>(scales.mutable_data_ptr());
    const cudaStream_t stream = current_cuda_stream(x);
    dispatch_float(params.dtype, [&](auto element) {
      if (group_size) {
        launch_fp8_quantize<decltype(element), 16>(params, stream);
      } else {
        launch_fp8_quantize<decltype(element), kFp8Threads>(params, stream);
      }
    });
  }
  return {codes, as_scales_of_rows(scales, x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("fp8_quantize", TORCH_BOX(&fp8_quantize_cuda));
}

}  // namespace effllm
