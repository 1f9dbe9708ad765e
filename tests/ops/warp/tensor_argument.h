// Tensors that Python passes: `TensorArgument` of tests/kernel_on_cpu.py.
#pragma once

#include <cstdint>
#include <optional>

#include "common/view.h"

struct TensorArgument {
  void* data;
  int dtype, rank;  // rank 0: None
  const int64_t *sizes, *strides;

  std::optional<effllm::View> view() const {
    if (rank == 0) return std::nullopt;
    return effllm::View{"argument", data,   static_cast<effllm::DType>(dtype), {}, rank,
                        sizes,      strides};
  }
};
