// cp.async: copies from global to shared memory that do not pass through registers.
#pragma once

#include <cstdint>

namespace effllm::ptx {

// Copies 16 bytes past L1.
__device__ __forceinline__ void cp_async_16(void* dst_smem, const void* src_gmem) {
  const auto dst = static_cast<uint32_t>(__cvta_generic_to_shared(dst_smem));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src_gmem) : "memory");
}

// The same, or, if `valid` is false, writes 16 zero bytes and reads nothing.
__device__ __forceinline__ void cp_async_16(void* dst_smem, const void* src_gmem, bool valid) {
  const auto dst = static_cast<uint32_t>(__cvta_generic_to_shared(dst_smem));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src_gmem), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` groups of this thread are unfinished. Other threads see the data
// after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace effllm::ptx
