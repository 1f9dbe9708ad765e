// Loads with cache hints.
#pragma once

#include <cstdint>

namespace effllm::ptx {

// 16 bytes that are read once: not kept in L1; L2 fetches the whole 128-byte line.
__device__ __forceinline__ uint4 load_streaming_16(const void* src_gmem) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(src_gmem));
  return value;
}

// The line of 128 bytes into L2. Loads see what is written to it later all the same.
__device__ __forceinline__ void prefetch_l2(const void* src_gmem) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(src_gmem));
}

}  // namespace effllm::ptx
