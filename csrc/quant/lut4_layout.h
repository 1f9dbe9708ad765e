// A codebook of 16 values of 16 bits in registers, and how packed codes are looked up in it without
// any memory, by byte permutations alone (prmt in PTX).
//
// The codebook is held as two planes, of the low and of the high bytes of its entries:
//
//   low[0]   entries  0 ..  3       high[0]   entries  0 ..  3      entry i is byte i % 4 of
//   low[1]   entries  4 ..  7       high[1]   entries  4 ..  7      word i / 4
//   low[2]   entries  8 .. 11       high[2]   entries  8 .. 11
//   low[3]   entries 12 .. 15       high[3]   entries 12 .. 15
//
// A permutation picks four of the eight bytes of two words, so four codes take two of them per
// plane, by bits 0 .. 2, and a choice between the two by bit 3.
#pragma once

#include <cstdint>

namespace effllm {

// Aligned so that each plane is one load.
struct alignas(16) Lut4Planes {
  uint32_t low[4], high[4];
};

// One plane's bytes of four codes: `indices` are their bits 0 .. 2 as nibbles, `bit3` has all bits
// set in the bytes of those with bit 3.
template <class Permute>
constexpr uint32_t lut4_plane_bytes(const uint32_t (&plane)[4], uint32_t indices, uint32_t bit3,
                                    const Permute& permute) {
  return (permute(plane[0], plane[1], indices) & ~bit3) |
         (permute(plane[2], plane[3], indices) & bit3);
}

// The A fragment of mma.m16n8k16 (and of a warp's part of a wgmma) for one word of packed codes:
// registers 0 and 2 belong to row r, looked up in `upper`, registers 1 and 3 to row r + 8, looked
// up in `lower`; the two may be the same. `permute(a, b, selector)` is ptx::Permute or does the
// same; tests run this on the CPU.
//
// With code c of the word at bits 4 c .. 4 c + 3, register j wants codes j and j + 4. Row r then
// has codes 0, 2, 4, 6, row r + 8 the others. Each row's four are brought together in an order that
// takes one shift.
template <class Permute>
constexpr void lut4_look_up(uint32_t word, const Lut4Planes& upper, const Lut4Planes& lower,
                            const Permute& permute, uint32_t (&a)[4]) {
  constexpr uint32_t kEven = 0x0f0f0f0fu;
  const uint32_t indices = word & 0x77777777u;
  // Lowest nibble first: codes 0, 4, 2, 6 and 5, 1, 7, 3. Permutations ignore bits 16 .. 31.
  const uint32_t upper_indices = (indices & kEven) | (indices >> 12 & ~kEven);
  const uint32_t lower_indices = (indices & ~kEven) | (indices >> 20 & kEven);
  // Bit 3 of odd codes is the sign of a byte of the word, that of even ones after a shift.
  const uint32_t upper_bit3 = permute(word << 4, 0, 0xb9a8);
  const uint32_t lower_bit3 = permute(word, 0, 0x9b8a);

  const uint32_t upper_low = lut4_plane_bytes(upper.low, upper_indices, upper_bit3, permute);
  const uint32_t upper_high = lut4_plane_bytes(upper.high, upper_indices, upper_bit3, permute);
  const uint32_t lower_low = lut4_plane_bytes(lower.low, lower_indices, lower_bit3, permute);
  const uint32_t lower_high = lut4_plane_bytes(lower.high, lower_indices, lower_bit3, permute);

  a[0] = permute(upper_low, upper_high, 0x5140);
  a[2] = permute(upper_low, upper_high, 0x7362);
  a[1] = permute(lower_low, lower_high, 0x4051);
  a[3] = permute(lower_low, lower_high, 0x6273);
}

}  // namespace effllm
