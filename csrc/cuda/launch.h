// The one way to launch a kernel: params struct in, error out as an exception that names the op.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "common/check.h"

namespace effllm {

inline void check_cuda(cudaError_t status, const char* op, const char* what) {
  if (status == cudaSuccess) return;
  std::string message = std::string(what) + " failed: " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice) {
    message += "; the library holds no code for this GPU (see `python -m effllm env`)";
  }
  fail(op, message);
}

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* op) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), op, "device query");
  return value;
}

inline constexpr int kMaxClusterCtas = 8;  // the largest cluster that every sm_90 schedules

// Clusters of `cluster` CTAs that the current device runs at the same time.
template <class Params>
int max_resident_clusters(const char* op, void (*kernel)(Params), int threads, int smem_bytes,
                          int cluster) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
             op, "shared memory opt-in");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), op, "occupancy query");
  return clusters;
}

struct Launch {
  const char* op;  // for the error text
  dim3 grid, block;
  size_t smem_bytes;
  cudaStream_t stream;
  int cluster = 1;  // CTAs, neighbours in x, that see each other's shared memory (sm_90)
  // Whether it may start before the kernel ahead of it has finished (sm_90). It must then wait,
  // with grid_dependency_wait, before it reads what that one may write, or writes anything.
  bool early_start = false;

  template <class Params>
  void operator()(void (*kernel)(Params), const Params& params) const {
    constexpr size_t kDefaultLimit = 48 * 1024;
    if (smem_bytes > kDefaultLimit) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(smem_bytes)),
                 op, "shared memory opt-in");
    }
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    if (early_start) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    check_cuda(cudaLaunchKernelEx(&config, kernel, params), op, "kernel launch");
  }
};

}  // namespace effllm
