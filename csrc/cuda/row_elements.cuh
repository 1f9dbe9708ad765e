// A row of floats, element by element, in loads of 16 bytes wherever it starts.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"
#include "ptx/cp_async.cuh"

namespace effllm {

inline constexpr int kWarpSize = 32;

// Vectors of 16 bytes on their way to each of kThreads threads. In shared memory: they go round
// in a loop that is not unrolled, which registers could not. A thread sees its own alone.
template <int kThreads>
struct RowQueue {
  static constexpr int kAhead = 4;

  uint4 vectors[kAhead][kThreads];
};

// Calls body(index, value) for elements begin .. end - 1 of a row, shared out among the lanes of a
// warp; a lane's indices ascend.
template <class Element, int kThreads, class Body>
__device__ __forceinline__ void each_element(const Element* row, uint32_t begin, uint32_t end,
                                             RowQueue<kThreads>& queue, const Body& body) {
  constexpr uint32_t kVector = 16 / sizeof(Element);
  constexpr int kAhead = RowQueue<kThreads>::kAhead;
  const uint32_t lane = threadIdx.x % kWarpSize;
  // What comes before the first and after the last multiple of 16 bytes goes singly.
  const auto address = reinterpret_cast<uintptr_t>(row + begin);
  const uint32_t before = (0 - address) / sizeof(Element) % kVector;
  const uint32_t first = min(begin + before, end);
  const uint32_t num_vectors = (end - first) / kVector;
  const uint32_t last = first + num_vectors * kVector;

  const auto single = [&](uint32_t index) { body(index, device_to_float(row[index])); };
  const auto fetch = [&](int place, uint32_t vector) {
    if (vector < num_vectors) {
      ptx::cp_async_16(&queue.vectors[place][threadIdx.x], row + first + vector * kVector, true);
    }
    ptx::cp_async_commit();  // of nothing too: groups are counted
  };
  for (int i = 0; i < kAhead; ++i) fetch(i, lane + i * kWarpSize);
  if (begin + lane < first) single(begin + lane);
  int place = 0;
#pragma unroll 1
  for (uint32_t vector = lane; vector < num_vectors; vector += kWarpSize) {
    ptx::cp_async_wait<kAhead - 1>();
    const uint4 loaded = queue.vectors[place][threadIdx.x];
    const auto* elements = reinterpret_cast<const Element*>(&loaded);
#pragma unroll
    for (uint32_t k = 0; k < kVector; ++k) {
      body(first + vector * kVector + k, device_to_float(elements[k]));
    }
    fetch(place, vector + kAhead * kWarpSize);
    place = place + 1 < kAhead ? place + 1 : 0;
  }
  if (last + lane < end) single(last + lane);
}

}  // namespace effllm
