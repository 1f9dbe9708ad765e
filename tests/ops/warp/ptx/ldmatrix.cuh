// Stores of four 8 x 8 matrices, in place of csrc/ptx/ldmatrix.cuh.
#pragma once

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

}  // namespace effllm::ptx
