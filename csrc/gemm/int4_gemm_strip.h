// The decoder of int4_gemm for packed_gemm_strip.h: q - zero, in internal linkage as all there.
#pragma once

#include "gemm/packed_gemm_strip.h"

namespace effllm {

inline constexpr float kInt4CpuCodeBias = 128.0f;  // what codes are taken out of their words with

// Defined in int4_gemm_<isa>.cpp, on x86-64 alone.
void int4_strip_avx2(const PackedStrip& strip);
void int4_strip_avx512(const PackedStrip& strip);

namespace {

template <int kWidth>
struct Int4Decoder {
  // Numbers whatever the code: zeros of x take care of columns past K.
  static constexpr bool kTakesPadding = false;

  // `decoding` is one zero point, kInt4CpuCodeBias larger than it is.
  explicit Int4Decoder(const float* decoding) : zero(splat<kWidth>(*decoding)) {}

  // 0x43 above a code's byte makes both the upper half of the float q + 128: no conversion, no
  // shift.
  template <int kStep>
  FloatVector<kWidth> weights(Vector<uint32_t, kWidth> codes) const {
    using Bytes = Vector<uint8_t, kWidth>;
    return lanes_of_step<kStep, kWidth>(Bytes{}, Bytes{}, reinterpret_cast<Bytes>(codes),
                                        Bytes{} + uint8_t{0x43}) -
           zero;
  }

  FloatVector<kWidth> zero;
};

}  // namespace
}  // namespace effllm
