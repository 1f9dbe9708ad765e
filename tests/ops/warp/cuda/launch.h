// Launches that run at once, block after block, in place of csrc/cuda/launch.h.
#pragma once

#include "cuda_runtime.h"

namespace effllm {

inline constexpr int kMaxClusterCtas = 8;

struct Launch {
  const char* op;
  dim3 grid, block;
  size_t smem_bytes;
  cudaStream_t stream;

  template <class Params>
  void operator()(void (*kernel)(Params), const Params& params) const {
    for (unsigned idx = 0; idx < grid.x; ++idx) {
      warp::block.x = idx;
      warp::run([&] { kernel(params); }, block.x);
    }
  }
};

}  // namespace effllm
