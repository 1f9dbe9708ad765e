// Warps with different jobs in one kernel (sm_90): one lane that speaks for its warp, and registers
// that warpgroups hand to one another.
#pragma once

#include <cstdint>

namespace effllm::ptx {

// True in one lane of a converged warp, always the same one. Unlike a comparison of the lane's
// number it lets ptxas see that what follows is uniform: copy instructions need their operands so.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(elected));
  return elected != 0;
}

// A value that is the same in all lanes of the warp, as ptxas can then tell: it may keep it in the
// warp's uniform registers, and will not work it out again.
template <class T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

__device__ __forceinline__ int uniform_warp_idx() {
  return uniform(static_cast<int>(threadIdx.x) / 32);
}

// Registers per thread from here on, for all warps of a warpgroup. To grow waits until others of
// the CTA have given up as many.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace effllm::ptx
