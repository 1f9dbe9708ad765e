// Where a producer or consumer stands in a ring of shared-memory stages.
#pragma once

#include <cstdint>

namespace effllm {

// A consumer waits for full[stage] with `phase`, the producer for empty[stage] with `phase ^ 1`:
// its first pass then finds every stage free.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

}  // namespace effllm
