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
inline constexpr int kPlaneBytes = 16, kPlaneFloats = 4;

// Defined in lut4_gemm_<isa>.cpp, on x86-64 alone.
void lut4_strip_avx2(const PackedStrip& strip);
void lut4_strip_avx512(const PackedStrip& strip);

namespace {

// Of 16 floats, for the oldest processors.
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

// Of four planes.
template <int kWidth, class Plane>
struct PlaneDecoder {
  static constexpr bool kTakesPadding = true;

  explicit PlaneDecoder(const float* decoding)
      : planes{Plane(decoding), Plane(decoding + kPlaneFloats), Plane(decoding + 2 * kPlaneFloats),
               Plane(decoding + 3 * kPlaneFloats)} {}

  template <int kStep>
  FloatVector<kWidth> weights(Vector<uint32_t, kWidth> codes) const {
    using Bytes = Vector<uint8_t, kWidth>;
    const auto bytes = [&](int idx) { return reinterpret_cast<Bytes>(planes[idx].look_up(codes)); };
    return lanes_of_step<kStep, kWidth>(bytes(0), bytes(1), bytes(2), bytes(3));
  }

  Plane planes[4];
};

#if defined(__AVX2__)
struct Avx2Plane {
  explicit Avx2Plane(const float* from)
      : bytes(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))) {}

  __m256i look_up(Vector<uint32_t, 8> codes) const {
    return _mm256_shuffle_epi8(bytes, reinterpret_cast<__m256i>(codes));
  }

  __m256i bytes;
};

template <>
struct CodebookDecoder<8> : PlaneDecoder<8, Avx2Plane> {
  using PlaneDecoder::PlaneDecoder;
};
#endif

#if defined(__AVX512BW__)
struct Avx512Plane {
  // The form with a mask, here of everything: GCC 12 warns of the other's own code.
  explicit Avx512Plane(const float* from)
      : bytes(_mm512_maskz_broadcast_i32x4(
            0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))) {}

  __m512i look_up(Vector<uint32_t, 16> codes) const {
    return _mm512_shuffle_epi8(bytes, reinterpret_cast<__m512i>(codes));
  }

  __m512i bytes;
};

template <>
struct CodebookDecoder<16> : PlaneDecoder<16, Avx512Plane> {
  using PlaneDecoder::PlaneDecoder;
};
#endif

}  // namespace
}  // namespace effllm
