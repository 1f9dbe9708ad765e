// Words that lanes of warp::run tell one another by, in place of csrc/ptx/atomic.cuh.
#pragma once

#include <cstdint>

namespace effllm::ptx {

inline uint64_t atomic_add_acq_rel(uint64_t* word, uint64_t value) {
  const uint64_t before = *word;
  *word += value;
  return before;
}

inline void store_relaxed(uint64_t* word, uint64_t value) { *word = value; }

inline void fence() {}

inline uint64_t load_acquire(const uint64_t* word) { return *word; }

}  // namespace effllm::ptx
