// Launches of kernels on warps that take turns, CTA by CTA: in place of csrc/cuda/launch.h.
#pragma once

#include "common/check.h"
#include "cuda_runtime.h"

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <class Params>
int cudaFuncSetAttribute(void (*)(Params), cudaFuncAttribute, int) {
  return 0;
}

namespace effllm {

inline constexpr int kMaxClusterCtas = 8;

inline int fake_num_sms = 1, fake_capability = 8;

inline int device_attribute(cudaDeviceAttr attribute, int, const char*) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return fake_num_sms;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return 80 * 1024;
    default:
      return fake_capability;
  }
}

inline void check_cuda(int, const char*, const char*) {}

// There is no shared memory for more CTAs than one at a time.
template <class Params>
int max_resident_clusters(const char*, void (*)(Params), int, int, int cluster) {
  return cluster == 1;
}

struct Launch {
  const char* op;
  dim3 grid, block;
  size_t smem_bytes;
  cudaStream_t stream;
  int cluster = 1;
  bool early_start = false;

  template <class Params>
  void operator()(void (*kernel)(Params), const Params& params) const {
    warp::grid.x = grid.x;
    for (warp::block.x = 0; warp::block.x < grid.x; ++warp::block.x) {
      warp::run([&] { kernel(params); }, block.x);
    }
    warp::block.x = 0;
  }
};

}  // namespace effllm
