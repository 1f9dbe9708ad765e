// The launch of rms_norm_rows.cuh's kernel.
#pragma once

#include "quant/code_rows_launch.cuh"
#include "quant/rms_norm_rows.cuh"

namespace effllm {

template <class Scale, bool kAdd>
void launch_rms_norm_rows(const char* op, const RmsNormParams& params, cudaStream_t stream) {
  const RowsLaunch grid = rms_norm_rows_launch(params);
  launch_rows(op, params.rows, grid, stream, [&](const Launch& launch, auto element, auto slots) {
    launch(rms_norm_rows_kernel<Scale, decltype(element), slots(), kAdd>, params);
  });
}

}  // namespace effllm
