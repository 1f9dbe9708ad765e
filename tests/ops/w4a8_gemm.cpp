// w4a8_gemm's mma.sync kernel on lanes that take turns; test_w4a8_kernels.py compiles it, and calls
// it with tensors.
#include "gemm/w4a8_gemm_sm80.cuh"

#include <cstdint>
#include <cstdio>
#include <exception>

#include "tensor_argument.h"

// The tensors in the order of the schema, and out.
extern "C" int w4a8_gemm_sm80(const TensorArgument* tensors, int64_t group_size) {
  const auto view = [&](int idx) { return tensors[idx].view(); };
  const effllm::View out = *view(6);
  try {
    effllm::W4A8GemmParams params =
        effllm::check_w4a8_gemm(*view(0), {*view(1), *view(1)}, *view(2), *view(3), view(4),
                                view(5), group_size, out.dtype);
    params.out = out.data;
    effllm::launch_w4a8_gemm_sm80("w4a8_gemm", params, nullptr);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}
