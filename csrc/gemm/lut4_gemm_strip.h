// The decoder of lut4_gemm for packed_gemm_strip.h: entries of a codebook, in internal linkage as
// all there (the compiler's intrinsics are never functions of their own).
//
// With AVX2 and AVX-512 the 16 floats of a codebook are kept as four "planes", one for each byte of
// a float: 16 bytes, of entries 0 .. 15. A byte shuffle looks up one plane for all codes of a
// vector at once, within each 16 bytes, so the plane is repeated there. It yields 0 for a code with
// kPackedCpuPadding. Elsewhere they are kept as floats, in as many bytes.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "gemm/packed_gemm_strip.h"

namespace effllm {

inline constexpr int kTableFloats = 16;  // of a codebook, or in the size of its planes
inline constexpr int kPlaneBytes = 16;

// Defined in lut4_gemm_<isa>.cpp, on x86-64 alone.
void lut4_strip_avx2(const PackedStrip& strip);
void lut4_strip_avx512(const PackedStrip& strip);

namespace {

#if defined(__AVX512BW__)
using Plane = __m512i;

inline Plane load_plane(const void* bytes) {
  // The form with a mask, here of everything: GCC 12 warns of the other's own code.
  return _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}

inline Plane look_up(Plane plane, Plane codes) { return _mm512_shuffle_epi8(plane, codes); }
#elif defined(__AVX2__)
using Plane = __m256i;

inline Plane load_plane(const void* bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}

inline Plane look_up(Plane plane, Plane codes) { return _mm256_shuffle_epi8(plane, codes); }
#endif

#if defined(__AVX2__)
template <int kWidth>
struct CodebookDecoder {
  static constexpr bool kTakesPadding = true;

  // `decoding` is the four planes of a codebook.
  explicit CodebookDecoder(const float* decoding) {
    for (int idx = 0; idx < 4; ++idx) planes[idx] = load_plane(decoding + idx * kPlaneBytes / 4);
  }

  template <int kStep>
  FloatVector<kWidth> weights(Vector<uint32_t, kWidth> codes) const {
    using Bytes = Vector<uint8_t, kWidth>;
    const auto bytes = [&](int idx) {
      return reinterpret_cast<Bytes>(look_up(planes[idx], reinterpret_cast<Plane>(codes)));
    };
    return lanes_of_step<kStep, kWidth>(bytes(0), bytes(1), bytes(2), bytes(3));
  }

  Plane planes[4];
};
#else
template <int kWidth>
struct CodebookDecoder {
  static_assert(kWidth == 4, "lane b of a step is byte b of one word");
  static constexpr bool kTakesPadding = true;

  explicit CodebookDecoder(const float* decoding) : entries(decoding) {}

  template <int kStep>
  FloatVector<kWidth> weights(Vector<uint32_t, kWidth> codes) const {
    const uint32_t word = codes[kStep];
    const auto entry = [&](int byte) {
      const uint32_t code = word >> (8 * byte) & 0xff;
      return code < kPackedCpuPadding ? entries[code] : 0.0f;
    };
    return FloatVector<kWidth>{entry(0), entry(1), entry(2), entry(3)};
  }

  const float* entries;
};
#endif

}  // namespace
}  // namespace effllm
