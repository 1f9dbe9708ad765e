// Launches that run at once, block after block, in place of csrc/cuda/launch.h.
#pragma once

#include "cuda_runtime.h"

namespace effllm {

inline constexpr int kMaxClusterCtas = 8;

enum { cudaDevAttrMultiProcessorCount };
inline int device_attribute(int, int, const char*) { return 1; }

template <class Params>
int max_resident_clusters(const char*, void (*)(Params), int, int, int) {
  return 1;
}

struct Launch {
  const char* op;
  dim3 grid, block;
  size_t smem_bytes;
  cudaStream_t stream;
  int cluster = 1;  // there is no shared memory for more
  bool early_start = false;

  template <class Params>
  void operator()(void (*kernel)(Params), const Params& params) const {
    warp::grid.x = grid.x;
    for (unsigned idx = 0; idx < grid.x; ++idx) {
      warp::block.x = idx;
      warp::run([&] { kernel(params); }, block.x);
    }
  }
};

}  // namespace effllm
