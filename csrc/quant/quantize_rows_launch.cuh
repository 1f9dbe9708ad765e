// The launch of quantize_rows.cuh's kernel.
#pragma once

#include "quant/code_rows_launch.cuh"
#include "quant/quantize_rows.cuh"

namespace effllm {

template <class Scale>
void launch_quantize_rows(const char* op, const QuantizeRowsParams& params, cudaStream_t stream) {
  const RowsLaunch grid = quantize_rows_launch(params);
  launch_rows(op, params.rows, grid, stream, [&](const Launch& launch, auto element, auto slots) {
    launch(quantize_rows_kernel<Scale, decltype(element), slots()>,
           QuantizeRowsKernelParams{params, grid.pieces});
  });
}

}  // namespace effllm
