// Programmatic dependent launch (sm_90): a kernel that starts while the one before it still runs.
// Earlier GPUs have no such launches, and nothing to say or wait for.
#pragma once

namespace effllm::ptx {

// Until the kernels that this one depends on have finished and their writes are seen. Nothing to
// wait for unless the launch allowed an early start.
__device__ __forceinline__ void grid_dependency_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start, where it is allowed to, once all CTAs of this one have said so.
__device__ __forceinline__ void grid_launch_dependents() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace effllm::ptx
