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

// What a code becomes: q - 8, q less the zero point of its row, or q - 8 times its row's
// multiplier.
enum class W4A8Decoding { kMiddle, kZeros, kMultipliers };

// Sums are to be divided by 2^kShift. What rows g and g + 8 of a word bring is a byte each, a
// `pair` of them together.
//   pair(first, second)                of any values: those that count
//   rows(pair)                         as decode wants them
//   decode(word, rows, low, high)      rows g and g + 8
template <W4A8Decoding kDecoding>
struct W4A8Codes;

struct W4A8CodesBase {
  static constexpr uint32_t kCodes = 0x0f0f0f0fu, kSigns = 0x80808080u;
  static constexpr int kShift = 0;
};

// As 16 (q - 8), what takes half the instructions.
template <>
struct W4A8Codes<W4A8Decoding::kMiddle> : W4A8CodesBase {
  static constexpr int kShift = 4;
  struct Rows {};

  static __device__ __forceinline__ void decode(uint32_t word, const Rows&, uint32_t& low,
                                                uint32_t& high) {
    low = ptx::and_xor(word << 4, ~kCodes, kSigns);
    high = ptx::and_xor(word, ~kCodes, kSigns);
  }
};

template <>
struct W4A8Codes<W4A8Decoding::kZeros> : W4A8CodesBase {
  struct Rows {
    uint32_t zeros[2];
  };

  // Up to kW4A8MaxZero nothing is borrowed from the byte beside it.
  static __device__ __forceinline__ uint32_t pair(int first, int second) {
    return static_cast<uint32_t>(min(first, kW4A8MaxZero) | min(second, kW4A8MaxZero) << 8);
  }
  static __device__ __forceinline__ Rows rows(uint32_t pair) {
    const ptx::Permute permute;
    return {{permute(pair, pair, 0x0000), permute(pair, pair, 0x1111)}};
  }
  static __device__ __forceinline__ void decode(uint32_t word, const Rows& rows, uint32_t& low,
                                                uint32_t& high) {
    low = (ptx::and_or(word, kCodes, kSigns) - rows.zeros[0]) ^ kSigns;
    high = (ptx::and_or(word >> 4, kCodes, kSigns) - rows.zeros[1]) ^ kSigns;
  }
};

// Four codes are multiplied at once: q * m - 8 * m, which with 128 more is 8 .. 233, carries
// nothing into the byte above.
template <>
struct W4A8Codes<W4A8Decoding::kMultipliers> : W4A8CodesBase {
  struct Rows {
    uint32_t factors[2], offsets[2];
  };

  static __device__ __forceinline__ uint32_t pair(int first, int second) {
    return static_cast<uint32_t>((first | second << 8) & 0x0f0f);
  }
  static __device__ __forceinline__ Rows rows(uint32_t pair) {
    const uint32_t first = pair & 0xff, second = pair >> 8;
    return {{first, second}, {kSigns - first * 0x08080808u, kSigns - second * 0x08080808u}};
  }
  static __device__ __forceinline__ void decode(uint32_t word, const Rows& rows, uint32_t& low,
                                                uint32_t& high) {
    low = ((word & kCodes) * rows.factors[0] + rows.offsets[0]) ^ kSigns;
    high = (((word >> 4) & kCodes) * rows.factors[1] + rows.offsets[1]) ^ kSigns;
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
