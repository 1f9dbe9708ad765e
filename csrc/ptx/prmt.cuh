// prmt: any four of eight bytes.
#pragma once

#include <cstdint>

namespace effllm::ptx {

// Nibble i of `selector`, of its low four, picks byte i of the result: bytes 0 .. 3 are a's, 4 .. 7
// b's. With 8 added to it, the picked byte's sign in all bits.
struct Permute {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
  }
};

}  // namespace effllm::ptx
