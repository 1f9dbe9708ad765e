// Three-input logic of warp::run, in place of csrc/ptx/lop3.cuh.
#pragma once

#include <cstdint>

namespace effllm::ptx {

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) ^ bits; }

}  // namespace effllm::ptx
