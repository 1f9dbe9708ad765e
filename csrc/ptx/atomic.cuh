// Words in global memory that CTAs tell one another by.
#pragma once

#include <cstdint>

namespace effllm::ptx {

// Adds and returns what was there. Who sees the sum sees what this thread had written or been shown
// before, and this thread sees the same of all who added before it.
__device__ __forceinline__ uint64_t atomic_add_acq_rel(uint64_t* word_gmem, uint64_t value) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(word_gmem), "l"(value)
               : "memory");
  return before;
}

// A write in one piece, ordered before and after nothing but other accesses of the word.
__device__ __forceinline__ void store_relaxed(uint64_t* word_gmem, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word_gmem), "l"(value) : "memory");
}

// Who sees what this thread writes after it sees what it had written or been shown before.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// A read of what others release: this thread sees what they had written before.
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* word_gmem) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word_gmem) : "memory");
  return value;
}

}  // namespace effllm::ptx
