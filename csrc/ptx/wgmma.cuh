// wgmma: the asynchronous tensor-core products of a warpgroup (sm_90a), what goes around them.
#pragma once

#include <cstdint>

#include "ptx/wgmma_16bit.cuh"
#include "ptx/wgmma_8bit.cuh"

namespace effllm::ptx {

// Before the first wgmma of a batch: registers written by ordinary instructions are ready for it.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `kPending` committed batches are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps reads and writes of accumulators on their side of a fence or wait. As what they are: floats
// through integer references would make ptxas serialise every wgmma of the kernel.
template <int kCount>
__device__ __forceinline__ void pin_accumulators(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin_accumulators(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Keeps what is written to registers of A before the waits and fences that follow: else it may end
// up behind the fence, and ptxas adds one.
__device__ __forceinline__ void pin_operand(uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// A K-major tile whose rows are 128 bytes, swizzled by 128 bytes as TMA writes them, eight rows to
// 1024 bytes; it starts at a multiple of 1024. Along K advance by 32 bytes per wgmma.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem_address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kStride = static_cast<uint64_t>(1024 >> 4) << 32;
  constexpr uint64_t kLeading = 1ull << 16;  // not used by swizzled K-major tiles
  return ((smem_address & 0x3ffffu) >> 4) | kLeading | kStride | kSwizzle128;
}

// A tile b[K, N] in panels of 64 columns: rows of 128 bytes, swizzled by 128 bytes, eight of them
// to 1024 bytes; panels are `panel_bytes` apart. Along K advance by 2048 bytes per wgmma of 16
// rows.
__device__ __forceinline__ uint64_t wgmma_mn_descriptor(uint32_t smem_address, int panel_bytes) {
  return wgmma_descriptor(smem_address) +
         (static_cast<uint64_t>((panel_bytes >> 4) - 1) << 16);  // the leading stride
}

__device__ __forceinline__ uint64_t advance_descriptor(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace effllm::ptx
