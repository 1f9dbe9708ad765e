// Kernels of warp::run run one after the other: in place of csrc/ptx/grid.cuh.
#pragma once

namespace effllm::ptx {

inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}

}  // namespace effllm::ptx
