// Tensor-core products of warp::run, in place of csrc/ptx/mma.cuh.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda_runtime.h"

namespace effllm::ptx {

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto pair = [](uint32_t low, uint32_t high) { return low | uint64_t{high} << 32; };
  const warp::Words upper = warp::exchange(pair(a[0], a[2]));  // of rows g
  const warp::Words lower = warp::exchange(pair(a[1], a[3]));  // of rows g + 8
  const warp::Words right = warp::exchange(pair(b0, b1));
  // Element k of 16 of a row's, or column's, four lanes.
  const auto element = [](const warp::Words& words, int line, int k) {
    const uint64_t word = words[line * 4 + k % 8 / 2] >> (k / 8 * 32 + k % 2 * 16);
    return to_float(T{static_cast<uint16_t>(word)});
  };
  const int group = static_cast<int>(threadIdx.x % 32) / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      sum += element(i < 2 ? upper : lower, group, k) * element(right, column + i % 2, k);
    }
    d[i] = static_cast<float>(sum);
  }
}

// Of four bytes along k by four.
inline int32_t dot_int8(uint32_t a, uint32_t b) {
  int32_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  }
  return sum;
}

// Lane 4 g + c has rows g and g + 8 of a, column g of b, and columns 2 c and 2 c + 1 of d.
inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto pair = [](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; };
  const warp::Words left = warp::exchange(pair(a[0], a[1]));
  const warp::Words right = warp::exchange(pair(a[2], a[3]));
  const warp::Words columns = warp::exchange(pair(b0, b1));
  const unsigned lane = threadIdx.x % warp::kLanes;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned half = 32 * (i / 2);
    for (unsigned k = 0; k < 4; ++k) {
      const unsigned row = lane / 4 * 4 + k, column = (lane % 4 * 2 + i % 2) * 4 + k;
      d[i] += dot_int8(static_cast<uint32_t>(left[row] >> half),
                       static_cast<uint32_t>(columns[column]));
      d[i] += dot_int8(static_cast<uint32_t>(right[row] >> half),
                       static_cast<uint32_t>(columns[column] >> 32));
    }
  }
}

}  // namespace effllm::ptx
