// The launch of silu_mul_rows.cuh's kernel.
#pragma once

#include "quant/code_rows_launch.cuh"
#include "quant/silu_mul_rows.cuh"

namespace effllm {

template <class Scale>
void launch_silu_mul_rows(const char* op, const SiluMulParams& params, cudaStream_t stream) {
  const RowsLaunch grid = silu_mul_rows_launch(params);
  launch_rows(op, params.rows, grid, stream, [&](const Launch& launch, auto element, auto slots) {
    launch(silu_mul_rows_kernel<Scale, decltype(element), slots()>,
           SiluMulKernelParams{params, grid.pieces});
  });
}

}  // namespace effllm
