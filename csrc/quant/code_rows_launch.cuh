// The launch that kernels of code_rows.cuh have in common.
#pragma once

#include <cuda_runtime.h>

#include "common/dispatch.h"
#include "cuda/launch.h"
#include "quant/code_rows.cuh"

namespace effllm {

// `body(launch, element, slots)` launches the kernel of that type of rows and number of slots.
template <class Body>
void launch_rows(const char* op, const CodeRows& rows, const RowsLaunch& grid, cudaStream_t stream,
                 const Body& body) {
  if (grid.blocks == 0) return;
  check_rows_launch(op, rows, grid);
  const Launch launch{op, dim3(static_cast<unsigned>(grid.blocks)),
                      dim3(static_cast<unsigned>(grid.threads)), 0, stream};
  dispatch_float(rows.dtype, [&](auto element) {
    dispatch_slots<decltype(element)>(grid.slots,
                                      [&](auto slots) { body(launch, element, slots); });
  });
}

}  // namespace effllm
