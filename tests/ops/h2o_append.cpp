// h2o_append's kernel on warps whose lanes take turns; test_h2o_append.py compiles it, and calls it with tensors.
#include "kvcache/h2o_append.cuh"

#include <cstdint>
#include <optional>

#include "tensor_argument.h"

// Tensors in the order of the schema.
extern "C" void h2o_append_on_warps(const TensorArgument* tensors, int64_t budget, int64_t recent,
                                    int64_t n_sink, bool normalize) {
  using namespace effllm;
  const auto view = [&](int idx) { return tensors[idx].view(); };
  const H2oAppendParams params =
      check_h2o_append(*view(0), *view(1), *view(2), *view(3), *view(4), *view(5), *view(6),
                       *view(7), *view(8), view(9), view(10), budget, recent, n_sink, normalize);
  if (params.append.num_tokens == 0 || params.append.num_kv_heads == 0) return;
  launch_h2o_append(params, 0, nullptr);
}
