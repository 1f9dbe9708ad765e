// A row of floats, element by element, in loads of 16 bytes wherever it starts.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"

namespace effllm {

inline constexpr int kWarpSize = 32;

// Calls body(index, value) for elements begin .. end - 1 of a row, shared out among the lanes of a
// warp; a lane's indices ascend.
template <class Element, class Body>
__device__ __forceinline__ void each_element(const Element* row, uint32_t begin, uint32_t end,
                                             const Body& body) {
  constexpr uint32_t kVector = 16 / sizeof(Element);
  constexpr int kAhead = 4;  // vectors of each lane on their way
  const uint32_t lane = threadIdx.x % kWarpSize;
  // What comes before the first and after the last multiple of 16 bytes goes singly.
  const auto address = reinterpret_cast<uintptr_t>(row + begin);
  const uint32_t before = (0 - address) / sizeof(Element) % kVector;
  const uint32_t first = min(begin + before, end);
  const uint32_t num_vectors = (end - first) / kVector;
  const uint32_t last = first + num_vectors * kVector;
  const auto* vectors = reinterpret_cast<const uint4*>(row + first);

  const auto single = [&](uint32_t index) { body(index, device_to_float(row[index])); };
  if (begin + lane < first) single(begin + lane);
  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const uint32_t vector = lane + i * kWarpSize;
    if (vector < num_vectors) ahead[i] = vectors[vector];
  }
  // Unrolled it would be faster by moves alone, and much larger, as bodies are.
#pragma unroll 1
  for (uint32_t vector = lane; vector < num_vectors; vector += kWarpSize) {
    const uint4 loaded = ahead[0];
#pragma unroll
    for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
    const uint32_t next = vector + kAhead * kWarpSize;
    if (next < num_vectors) ahead[kAhead - 1] = vectors[next];
    const auto* elements = reinterpret_cast<const Element*>(&loaded);
#pragma unroll
    for (uint32_t k = 0; k < kVector; ++k) {
      body(first + vector * kVector + k, device_to_float(elements[k]));
    }
  }
  if (last + lane < end) single(last + lane);
}

}  // namespace effllm
