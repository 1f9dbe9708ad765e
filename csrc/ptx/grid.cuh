// Programmatic dependent launch (sm_90): a kernel that starts while the one before it still runs.
#pragma once

namespace effllm::ptx {

// Until the kernels that this one depends on have finished and their writes are seen. Nothing to
// wait for unless the launch allowed an early start.
__device__ __forceinline__ void grid_dependency_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel may start, where it is allowed to, once all CTAs of this one have said so.
__device__ __forceinline__ void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace effllm::ptx
