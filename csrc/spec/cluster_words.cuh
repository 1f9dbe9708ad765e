// Words that the threads of a CTA, or of a cluster of them, show one another.
#pragma once

#include <cstdint>

#include "cuda/row_elements.cuh"
#include "ptx/cluster.cuh"

namespace effllm {

template <class Fold>
__device__ __forceinline__ uint64_t warp_fold(uint64_t value, int width, const Fold& fold) {
  for (int lanes = 1; lanes < width; lanes *= 2) {
    value = fold(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  }
  return value;
}

struct Plus {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

struct Maximum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return max(a, b); }
};

// What groups of lanes have shown, in order of CTA and lane. In shared memory.
struct Words {
  const uint64_t* of_groups;
  int count;
};

// What `fold` makes of them, in every thread; 0 must change nothing.
template <class Fold>
__device__ __forceinline__ uint64_t fold(const Words& words, const Fold& fold) {
  uint64_t value = 0;
#pragma unroll 1
  for (int i = threadIdx.x % kWarpSize; i < words.count; i += kWarpSize) {
    value = fold(value, words.of_groups[i]);
  }
  return warp_fold(value, kWarpSize, fold);
}

__device__ __forceinline__ uint64_t total(const Words& words) { return fold(words, Plus{}); }
__device__ __forceinline__ uint64_t highest(const Words& words) { return fold(words, Maximum{}); }

template <int kThreads>
class ClusterWords {
 public:
  static constexpr int kMaxGroups = kThreads / 2;

  // Of each CTA, in shared memory: shown to its own threads, and to those of the cluster. Each has
  // two places by turns, so that nobody overwrites what others still read.
  struct Storage {
    uint64_t words[2][2][kMaxGroups];
  };

  const uint32_t rank, num_ctas;

  __device__ explicit ClusterWords(Storage& storage)
      : rank(ptx::cluster_rank()), num_ctas(ptx::cluster_size()), storage_(storage) {}

  // Shows a word of each `width` lanes to all threads, of this CTA if `alone`, else of the cluster.
  // It stays until the words after the next are shown to them. Waits for all of these threads.
  __device__ Words show(uint64_t word, int width, bool alone) {
    alone |= num_ctas == 1;
    const int whom = alone ? 0 : 1;
    uint64_t* words = storage_.words[whom][turns_ >> whom & 1];
    turns_ ^= 1 << whom;
    const uint32_t lanes = static_cast<uint32_t>(width), ctas = alone ? 1 : num_ctas;
    if (threadIdx.x % lanes == 0) {
      uint64_t* place = words + (threadIdx.x + (alone ? 0 : rank * kThreads)) / lanes;
#pragma unroll 1
      for (uint32_t cta = 0; cta < ctas; ++cta) *(alone ? place : peer(place, cta)) = word;
    }
    if (alone) {
      __syncthreads();
    } else {
      sync();
    }
    return {words, static_cast<int>(ctas * kThreads / lanes)};
  }

  // What CTA `cta` has where this one has `own` in shared memory.
  template <class T>
  __device__ T* peer(T* own, uint32_t cta) const {
    return num_ctas == 1 ? own : ptx::cluster_peer(own, cta);
  }

  __device__ void sync() const {
    if (num_ctas == 1) {
      __syncthreads();
    } else {
      __syncwarp();
      ptx::cluster_sync();
    }
  }

 private:
  Storage& storage_;
  int turns_ = 0;  // a bit for either kind
};

}  // namespace effllm
