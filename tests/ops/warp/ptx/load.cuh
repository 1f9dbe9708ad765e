// In place of csrc/ptx/load.cuh.
#pragma once

namespace effllm::ptx {

inline void prefetch_l2(const void*) {}

}  // namespace effllm::ptx
