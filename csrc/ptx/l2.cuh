// What L2 keeps of memory that a launch has to itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace effllm::ptx {

// The line of 128 bytes has served: it need not go to memory, and holds anything from now on.
__device__ __forceinline__ void discard_l2(const void* line_gmem) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line_gmem) : "memory");
}

}  // namespace effllm::ptx
