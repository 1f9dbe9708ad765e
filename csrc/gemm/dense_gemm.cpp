// dense_gemm: schema and CPU implementation.
#include "gemm/dense_gemm.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

// One output: eight sums side by side are what the compiler turns into vectors.
template <class T>
float dot(const float* x, const T* weight, int64_t k) {
  constexpr int64_t kLanes = 8;
  float sums[kLanes] = {};
  int64_t idx = 0;
  for (; idx + kLanes <= k; idx += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += x[idx + lane] * to_float(weight[idx + lane]);
    }
  }
  float sum = 0.0f;
  for (; idx < k; ++idx) sum += x[idx] * to_float(weight[idx]);
  for (float lane : sums) sum += lane;
  return sum;
}

template <class T>
void dense_gemm(const DenseGemmParams& params) {
  const auto* x = static_cast<const T*>(params.x);
  std::vector<float> wide(static_cast<size_t>(params.m * params.k));
  std::transform(x, x + wide.size(), wide.begin(), [](T value) { return to_float(value); });
  TorchThreads().for_each(params.n, 16, [&](int64_t n) {
    const T* weight = static_cast<const T*>(params.weight) + n * params.stride_weight_n;
    const float bias = params.bias == nullptr
                           ? 0.0f
                           : load_float(params.bias, params.bias_dtype, n * params.stride_bias);
    for (int64_t m = 0; m < params.m; ++m) {
      const float sum = dot(wide.data() + m * params.k, weight, params.k);
      static_cast<T*>(params.out)[m * params.n + n] = from_float<T>(sum + bias);
    }
  });
}

Tensor dense_gemm_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor x_rows = torch::stable::contiguous(x);
  DenseGemmParams params =
      check_dense_gemm(as_view(x_rows, "x"), as_view(weight, "weight"), as_view(bias, "bias"));
  Tensor out = new_empty_like_rows(x, params.n);
  params.out = out.mutable_data_ptr();
  dispatch_float(params.dtype, [&](auto element) { dense_gemm<decltype(element)>(params); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("dense_gemm(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("dense_gemm", TORCH_BOX(&dense_gemm_cpu)); }

}  // namespace effllm
