// Loads with cache hints.
#pragma once

#include <cstdint>

namespace effllm::ptx {

// 4, 8 or 16 bytes that are read once: not kept in L1; L2 fetches the whole 128-byte line.
template <int kWords>
__device__ __forceinline__ void load_streaming(uint32_t* words, const void* src_gmem) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(src_gmem));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(src_gmem));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];"
                 : "=r"(words[0])
                 : "l"(src_gmem));
  }
}

__device__ __forceinline__ uint4 load_streaming_16(const void* src_gmem) {
  uint32_t words[4];
  load_streaming<4>(words, src_gmem);
  return {words[0], words[1], words[2], words[3]};
}

// 1, 2 or 4 bytes, whose neighbours are wanted later: L2 fetches the whole 128-byte line. Not moved
// ahead of what precedes it.
__device__ __forceinline__ uint32_t load_line(const uint8_t* src_gmem) {
  uint32_t value;
  asm volatile("ld.global.L2::128B.u8 %0, [%1];" : "=r"(value) : "l"(src_gmem));
  return value;
}
__device__ __forceinline__ uint32_t load_line(const uint16_t* src_gmem) {
  uint16_t value;
  asm volatile("ld.global.L2::128B.u16 %0, [%1];" : "=h"(value) : "l"(src_gmem));
  return value;
}
__device__ __forceinline__ uint32_t load_line(const uint32_t* src_gmem) {
  uint32_t value;
  asm volatile("ld.global.L2::128B.u32 %0, [%1];" : "=r"(value) : "l"(src_gmem));
  return value;
}

// The line of 128 bytes into L2. Loads see what is written to it later all the same.
__device__ __forceinline__ void prefetch_l2(const void* src_gmem) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(src_gmem));
}

}  // namespace effllm::ptx
