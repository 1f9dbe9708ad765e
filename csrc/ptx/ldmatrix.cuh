// ldmatrix, stmatrix, movmatrix: 8 x 8 matrices of 16-bit elements in the layout of mma fragments.
#pragma once

#include <cstdint>

namespace effllm::ptx {

// Four matrices from shared memory: lane i points at row i % 8 of matrix i / 8. Register j of a
// lane holds elements (lane / 4, 2 * (lane % 4)) and its right neighbour of matrix j.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&matrices)[4], const void* row_smem) {
  const auto row = static_cast<uint32_t>(__cvta_generic_to_shared(row_smem));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row_smem) {
  const auto row = static_cast<uint32_t>(__cvta_generic_to_shared(row_smem));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

// Four matrices to shared memory: row i % 8 of matrix i / 8 is where lane i points at.
__device__ __forceinline__ void stmatrix_x4(void* row_smem, const uint32_t (&matrices)[4]) {
  const auto row = static_cast<uint32_t>(__cvta_generic_to_shared(row_smem));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// Four matrices to shared memory, each transposed: row i % 8 of matrix i / 8, which lane i points
// at, takes what the lanes hold of that matrix's column i % 8.
__device__ __forceinline__ void stmatrix_x4_trans(void* row_smem, const uint32_t (&matrices)[4]) {
  const auto row = static_cast<uint32_t>(__cvta_generic_to_shared(row_smem));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// Transposes a matrix that the warp holds in one register per lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t matrix) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

}  // namespace effllm::ptx
