// 4-bit codes as int8 in registers, and x in their order.
//
// A word of int4_layout.h has in the low half of its four bytes columns 2 c, 2 c + 8, 2 c + 1, 2 c
// + 9 of a block of 16, of row g, in the high half those of row g + 8: a mask makes of either the
// register of mma.m16n8k32 (and of wgmma) that lane 4 g + c holds of 16 columns. mma would have
// columns 4 c .. 4 c + 3 there. Any order will do that x has, too: so either x is brought into the
// order of the words, or words of two lanes are brought into that of x.
#pragma once

#include <cstdint>

#include "gemm/w4a8_gemm.h"
#include "ptx/lop3.cuh"
#include "ptx/prmt.cuh"

namespace effllm {

// q - zero. Without zero points, which are 8 then, as 16 (q - 8), what takes half the instructions:
// a sum is to be divided by 2^kShift.
template <bool kHasZeros>
struct W4A8Codes {
  static constexpr int kShift = kHasZeros ? 0 : 4;
  static constexpr uint32_t kSigns = 0x80808080u;

  // Up to kW4A8MaxZero nothing is borrowed from the byte beside it.
  static __device__ __forceinline__ uint32_t zero_bytes(int zero) {
    return static_cast<uint32_t>(min(zero, kW4A8MaxZero)) * 0x01010101u;
  }

  // Rows g and g + 8 of a word.
  static __device__ __forceinline__ void decode(uint32_t word, const uint32_t (&zeros)[2],
                                                uint32_t& low, uint32_t& high) {
    if constexpr (kHasZeros) {
      low = (ptx::and_or(word, 0x0f0f0f0fu, kSigns) - zeros[0]) ^ kSigns;
      high = (ptx::and_or(word >> 4, 0x0f0f0f0fu, kSigns) - zeros[1]) ^ kSigns;
    } else {
      low = ptx::and_xor(word << 4, 0xf0f0f0f0u, kSigns);
      high = ptx::and_xor(word, 0xf0f0f0f0u, kSigns);
    }
  }
};

// Words in the order of x: of 16 columns lane 4 g + c gets 4 c .. 4 c + 3, in the halves of bytes
// as above. They lie with lanes 4 g + 2 c % 4 and the one after it, in the bytes of columns below 8
// for the lower two of the four, above for the others.
struct W4A8Exchange {
  int first_lane;
  uint32_t selector;

  __device__ __forceinline__ explicit W4A8Exchange(int lane)
      : first_lane(lane / 4 * 4 + 2 * lane % 4), selector(lane % 4 < 2 ? 0x6420u : 0x7531u) {}

  __device__ __forceinline__ uint32_t operator()(uint32_t first, uint32_t second) const {
    return ptx::Permute()(first, second, selector);
  }
};

// 16 columns of x in the order of words: word c has columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9.
__device__ __forceinline__ uint4 w4a8_x_order(const uint4& x) {
  const ptx::Permute permute;
  return {permute(x.x, x.z, 0x5140), permute(x.x, x.z, 0x7362), permute(x.y, x.w, 0x5140),
          permute(x.y, x.w, 0x7362)};
}

}  // namespace effllm
