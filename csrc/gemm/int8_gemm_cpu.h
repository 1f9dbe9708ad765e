// What the int8 matmuls share on the CPU: which loop of int8_gemm_block.h, and scales of any type.
// In internal linkage, as that is.
#pragma once

#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "gemm/int8_gemm.h"
#include "gemm/int8_gemm_block.h"

namespace effllm {
namespace {

inline Int8BlockKernel select_int8_block_kernel() {
  constexpr Int8BlockKernel kBaseline = multiply_int8_block<Int8PlainDot>;
  if constexpr (kHasX86Isas) {
    const CpuIsa isa = cpu_isa();
    if (isa >= CpuIsa::kAvx512Vnni) return int8_block_avx512vnni;
    if (isa >= CpuIsa::kAvx2) return int8_block_avx2;
  }
  return kBaseline;
}

inline float load_int8_scale(const Int8RowValues& scales, int64_t row) {
  return load_float(scales.data, scales.dtype, row * scales.stride);
}

}  // namespace
}  // namespace effllm
