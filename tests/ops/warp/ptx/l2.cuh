// Memory of warp::run, in place of csrc/ptx/l2.cuh.
#pragma once

#include <cstring>

namespace effllm::ptx {

// Whoever reads it later finds NaN.
inline void discard_l2(const void* line) { std::memset(const_cast<void*>(line), 0xff, 128); }

}  // namespace effllm::ptx
