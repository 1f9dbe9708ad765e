// Matrices of 16-bit elements of warp::run, in place of csrc/ptx/ldmatrix.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace effllm::ptx {

// Row r of matrix j goes to where lane 8 j + r points; a lane holds columns 2 c and 2 c + 1 of row
// lane / 4 of each, or, transposed, rows of that column.
template <bool kTransposed>
void store_matrices(void* row_smem, const uint32_t (&matrices)[4]) {
  const warp::Words rows = warp::exchange(reinterpret_cast<uint64_t>(row_smem));
  const unsigned lane = threadIdx.x % warp::kLanes;
  for (unsigned j = 0; j < 4; ++j) {
    for (unsigned half = 0; half < 2; ++half) {
      unsigned row = lane / 4, column = lane % 4 * 2 + half;
      if (kTransposed) std::swap(row, column);
      const auto element = static_cast<uint16_t>(matrices[j] >> (16 * half));
      std::memcpy(reinterpret_cast<char*>(rows[8 * j + row]) + 2 * column, &element,
                  sizeof(element));
    }
  }
  warp::exchange(0);  // all have stored
}

inline void stmatrix_x4(void* row_smem, const uint32_t (&matrices)[4]) {
  store_matrices<false>(row_smem, matrices);
}
inline void stmatrix_x4_trans(void* row_smem, const uint32_t (&matrices)[4]) {
  store_matrices<true>(row_smem, matrices);
}

inline uint16_t element_of_row(const warp::Words& rows, int row, int column) {
  uint16_t element;
  std::memcpy(&element, reinterpret_cast<const char*>(rows[row]) + column * 2, 2);
  return element;
}

inline void ldmatrix_x4(uint32_t (&matrices)[4], const void* row_smem) {
  const warp::Words rows = warp::exchange(reinterpret_cast<uintptr_t>(row_smem));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = i * 8 + lane / 4, column = lane % 4 * 2;
    matrices[i] = element_of_row(rows, row, column) | element_of_row(rows, row, column + 1) << 16;
  }
  warp::exchange(0);  // all have read
}

inline void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row_smem) {
  const warp::Words rows = warp::exchange(reinterpret_cast<uintptr_t>(row_smem));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = i * 8 + lane % 4 * 2, column = lane / 4;
    matrices[i] = element_of_row(rows, row, column) | element_of_row(rows, row + 1, column) << 16;
  }
  warp::exchange(0);
}

inline uint32_t movmatrix_trans(uint32_t matrix) {
  const warp::Words& words = warp::exchange(matrix);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto element = [&](int row, int column) {
    return static_cast<uint32_t>(words[row * 4 + column / 2] >> (column % 2 * 16)) & 0xffff;
  };
  const int row = lane % 4 * 2, column = lane / 4;
  return element(row, column) | element(row + 1, column) << 16;
}

}  // namespace effllm::ptx
