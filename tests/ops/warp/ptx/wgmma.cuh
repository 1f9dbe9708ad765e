// wgmma of int8 with A from registers, done at once, in place of csrc/ptx/wgmma.cuh.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"

namespace effllm::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}
template <class T, int kCount>
void pin_accumulators(T (&)[kCount]) {}
inline void pin_operand(uint32_t (&)[4]) {}

inline uint64_t wgmma_descriptor(uint32_t smem_address) {
  if (smem_address % 1024 != 0) {
    std::printf("a swizzled tile must start at a multiple of 1024 bytes\n");
    std::exit(1);
  }
  return smem_address;
}
inline uint64_t wgmma_mn_descriptor(uint32_t smem_address, int) {
  return wgmma_descriptor(smem_address);
}
inline uint64_t advance_descriptor(uint64_t descriptor, int bytes) { return descriptor + bytes; }

template <class T, int kWidth>
struct Wgmma;

template <int kWidth>
struct Wgmma<int8_t, kWidth> {
  static void mma(int32_t (&d)[kWidth / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    const auto pair = [](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; };
    const warp::Words left = warp::exchange(pair(a[0], a[1]));
    const warp::Words right = warp::exchange(pair(a[2], a[3]));
    // Four bytes of row n of b, under the swizzle.
    const auto load = [&](int n, int k) {
      const auto linear = static_cast<uint32_t>(b) + n * 128 + k;
      uint32_t word;
      std::memcpy(&word, smem_pointer(linear ^ (linear >> 7 & 7) << 4), sizeof(word));
      return word;
    };
    const unsigned lane = threadIdx.x % warp::kLanes;
    for (int i = 0; i < kWidth / 2; ++i) {
      const int n = i / 4 * 8 + static_cast<int>(lane % 4 * 2) + i % 2, half = 32 * (i / 2 % 2);
      int32_t sum = accumulate ? d[i] : 0;
      for (int k = 0; k < 4; ++k) {
        const unsigned row = lane / 4 * 4 + k;
        sum += dot_int8(static_cast<uint32_t>(left[row] >> half), load(n, 4 * k));
        sum += dot_int8(static_cast<uint32_t>(right[row] >> half), load(n, 16 + 4 * k));
      }
      d[i] = sum;
    }
  }
};

}  // namespace effllm::ptx
