// Loads of warp::run, in place of csrc/ptx/load.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace effllm::ptx {

template <int kWords>
void load_streaming(uint32_t* words, const void* src) {
  if (reinterpret_cast<uintptr_t>(src) % (kWords * 4) != 0) {
    std::printf("a load of %d bytes from an address that is no multiple of it\n", kWords * 4);
    std::exit(1);
  }
  std::memcpy(words, src, kWords * 4);
}

template <class T>
uint32_t load_line(const T* src) {
  return *src;
}

inline void prefetch_l2(const void*) {}

}  // namespace effllm::ptx
