// Roofline: bytes. x is read twice, once for its largest magnitude, from L2 the second time if it
// fits there, and one byte per element is written. With a scale that is known it is read once.
#include <algorithm>
#include <tuple>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "quant/fp8_encode.cuh"
#include "quant/fp8_quantize_tensor.h"

namespace effllm {
namespace {

constexpr const char* kOp = "fp8_quantize_tensor";
constexpr int kBlocksPerSm = 4;

struct Fp8TensorKernelParams : Fp8QuantizeTensorParams {
  int32_t* largest;  // bits of max|x|, 0 before the first kernel
};

// Calls body(first element) for the vectors of this thread, evenly spaced over x.
template <int kVector, class Body>
__device__ __forceinline__ void for_each_vector(int64_t numel, const Body& body) {
  const int64_t step = int64_t{gridDim.x} * kFp8Threads * kVector;
  int64_t first = (int64_t{blockIdx.x} * kFp8Threads + threadIdx.x) * kVector;
  for (; first < numel; first += step) body(first);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kFp8Threads)
    find_largest_kernel(const __grid_constant__ Fp8TensorKernelParams params) {
  __shared__ int32_t warp_largest[kFp8Threads / 32];
  int32_t largest = 0;
  for_each_vector<kVector>(params.numel, [&](int64_t first) {
    float values[kVector];
    load_floats<kVector>(static_cast<const device_t<T>*>(params.x) + first, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest = max(largest, magnitude_bits(values[i]));
  });
  largest = block_max(largest, warp_largest);
  if (threadIdx.x == 0) atomicMax(params.largest, largest);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kFp8Threads)
    encode_kernel(const __grid_constant__ Fp8TensorKernelParams params) {
  const float scale = params.given_scale == nullptr
                          ? scale_of_largest<E4m3Scale>(*params.largest)
                          : device_load_float(params.given_scale, params.given_scale_dtype, 0);
  if (blockIdx.x == 0 && threadIdx.x == 0) *params.scale = scale;
  const E4m3Scale by = E4m3Scale::of(scale);
  for_each_vector<kVector>(params.numel, [&](int64_t first) {
    float values[kVector];
    load_floats<kVector>(static_cast<const device_t<T>*>(params.x) + first, values);
    store_codes<kVector>(values, by, params.codes + first);
  });
}

template <class T, int kVector>
void launch(const Fp8TensorKernelParams& params, int device, cudaStream_t stream) {
  const int64_t wanted = ceil_div<int64_t>(params.numel, kFp8Threads * kVector);
  const int64_t resident =
      int64_t{kBlocksPerSm} * device_attribute(cudaDevAttrMultiProcessorCount, device, kOp);
  // At least one block: a tensor of no elements has a scale, too.
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, resident));
  const Launch launch{kOp, dim3(blocks), dim3(kFp8Threads), 0, stream};
  if (params.given_scale == nullptr) {
    check_cuda(cudaMemsetAsync(params.largest, 0, sizeof(int32_t), stream), kOp, "memset");
    launch(find_largest_kernel<T, kVector>, params);
  }
  launch(encode_kernel<T, kVector>, params);
}

std::tuple<Tensor, Tensor> fp8_quantize_tensor_cuda(const Tensor& x,
                                                    const std::optional<Tensor>& scale) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Fp8TensorKernelParams params{
      check_fp8_quantize_tensor(as_view(x_rows, "x"), as_view(scale, "scale")), nullptr};
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor codes = new_empty_as(x, DType::kFloat8E4M3);
  Tensor used_scale = new_empty(x, {1}, DType::kFloat32);
  const Tensor largest = new_empty(x, {1}, DType::kInt32);
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  params.scale = static_cast<float*>(used_scale.mutable_data_ptr());
  params.largest = static_cast<int32_t*>(largest.mutable_data_ptr());
  const cudaStream_t stream = current_cuda_stream(x);
  dispatch_float(params.dtype, [&](auto element) {
    if (takes_vectors(params.x, params.numel)) {
      launch<decltype(element), 8>(params, device, stream);
    } else {
      launch<decltype(element), 1>(params, device, stream);
    }
  });
  return {codes, used_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("fp8_quantize_tensor", TORCH_BOX(&fp8_quantize_tensor_cuda));
}

}  // namespace effllm
