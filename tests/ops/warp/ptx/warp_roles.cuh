// In place of csrc/ptx/warp_roles.cuh.
#pragma once

#include "cuda_runtime.h"

namespace effllm::ptx {

inline bool elect_one() { return threadIdx.x % warp::kLanes == 0; }
template <class T>
T uniform(T value) {
  return value;
}
inline int uniform_warp_idx() { return static_cast<int>(threadIdx.x / warp::kLanes); }
template <int kRegisters>
void shrink_registers() {}
template <int kRegisters>
void grow_registers() {}

}  // namespace effllm::ptx
