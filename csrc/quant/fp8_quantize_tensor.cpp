// fp8_quantize_tensor: schema and CPU implementation.
#include "quant/fp8_quantize_tensor.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

constexpr int64_t kChunk = int64_t{1} << 15;  // elements at a time: what a thread pays off for

// Calls body(first, count) for the chunks of x, in any order.
template <class Body>
void for_each_chunk(const Fp8QuantizeTensorParams& params, const Body& body) {
  TorchThreads().for_each(ceil_div(params.numel, kChunk), 1, [&](int64_t index) {
    const int64_t first = index * kChunk;
    body(first, std::min(kChunk, params.numel - first));
  });
}

template <class T>
void quantize_tensor(const Fp8QuantizeTensorParams& params) {
  const T* x = static_cast<const T*>(params.x);
  if (params.given_scale != nullptr) {
    *params.scale = load_float(params.given_scale, params.given_scale_dtype, 0);
  } else {
    std::atomic<int32_t> largest = 0;
    for_each_chunk(params, [&](int64_t first, int64_t count) {
      const int32_t found = max_magnitude_bits(x + first, count);
      int32_t known = largest;
      while (known < found && !largest.compare_exchange_weak(known, found)) {
      }
    });
    *params.scale = symmetric_scale(largest, kE4M3Max);
  }
  for_each_chunk(params, [&](int64_t first, int64_t count) {
    encode_e4m3(x + first, count, *params.scale, params.codes + first);
  });
}

std::tuple<Tensor, Tensor> fp8_quantize_tensor_cpu(const Tensor& x,
                                                   const std::optional<Tensor>& scale) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Fp8QuantizeTensorParams params =
      check_fp8_quantize_tensor(as_view(x_rows, "x"), as_view(scale, "scale"));
  Tensor codes = new_empty_as(x, DType::kFloat8E4M3);
  Tensor used_scale = new_empty(x, {1}, DType::kFloat32);
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  params.scale = static_cast<float*>(used_scale.mutable_data_ptr());
  dispatch_float(params.dtype, [&](auto element) { quantize_tensor<decltype(element)>(params); });
  return {codes, used_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("fp8_quantize_tensor(Tensor x, Tensor? scale=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("fp8_quantize_tensor", TORCH_BOX(&fp8_quantize_tensor_cpu));
}

}  // namespace effllm
