// silu_mul_fp8_quantize and silu_mul_int8_quantize: silu(gate) * up, the middle of a gated MLP, as
// 8-bit codes and scales.
//
//   gate  [..., K]  fp16, bf16 or fp32; rows may be strided, as halves of one tensor are
//   up    [..., K]  dtype and shape of gate, strides of its own
//   xq, scales      as code_rows.h says
//
// The arithmetic is that of a Hugging Face LlamaMLP in the dtype of gate: silu(gate) is found in
// fp32 and rounded to the dtype, and so is its product with up. silu(g) = g * (1 / (1 + exp(-g)))
// with an exponential of this file's own, for the same bits on every device: no product is fused
// with a sum. It errs by less than 2^-21 (1 + |g| / 4) of itself, and is -0 where g is below -70.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/view.h"
#include "quant/code_rows.h"

namespace effllm {

// exp(-g) = 2^t = 2^n * 2^f, n the integer next to t: a shift of the exponent, and a polynomial
// that errs by 2^-23.4 for |f| <= 1/2.
inline constexpr float kMinusLog2E = -0x1.715476p+0f;
inline constexpr float kRounder = 0x1.8p23f;  // added, it leaves the integer in the last bits
inline constexpr float kLargestG = 44.f;      // exp(-44) is nothing beside 1
inline constexpr uint32_t kLeastGBits = 0xc28c0000;  // -70: silu is above -3e-29
inline constexpr float kPower1 = 0x1.62e42ap-1f, kPower2 = 0x1.ebf9bcp-3f, kPower3 = 0x1.c6b752p-5f,
                       kPower4 = 0x1.3cea88p-7f, kPower5 = 0x1.5bba14p-10f;

// Limits are compared as bits, which order as magnitudes do: of floats compilers make branches.
// Infinity times 0 is NaN as in torch, and NaN remains, as g itself is what is multiplied.
inline float silu(float g) {
  const int32_t limited = std::min(std::bit_cast<int32_t>(g), std::bit_cast<int32_t>(kLargestG));
  const float t = std::bit_cast<float>(limited) * kMinusLog2E;
  const float rounded = t + kRounder;
  const float f = t - (rounded - kRounder);
  float power = kPower5 * f + kPower4;
  power = power * f + kPower3;
  power = power * f + kPower2;
  power = power * f + kPower1;
  power = power * f + 1.f;
  const uint32_t bits = std::bit_cast<uint32_t>(power) + (std::bit_cast<uint32_t>(rounded) << 23);
  // Without its last bit: the one significand that iterations for a reciprocal miss has all bits.
  const uint32_t sum = std::bit_cast<uint32_t>(1.f + std::bit_cast<float>(bits)) & ~1u;
  const uint32_t sigmoid = std::bit_cast<uint32_t>(1.f / std::bit_cast<float>(sum));
  const uint32_t mask = std::bit_cast<uint32_t>(g) > kLeastGBits ? 0u : ~0u;
  return g * std::bit_cast<float>(sigmoid & mask);
}

struct SiluMulParams {
  CodeRows rows;
  StridedRows gate, up;
};

// Everything but what is written, and where the rows of gate and up are.
inline SiluMulParams check_silu_mul_rows(const char* op, const View& gate, const View& up,
                                         const std::optional<View>& scale,
                                         std::optional<int64_t> group_size) {
  Check check(op);
  Sym k("K");
  check(gate).last_dim(k).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  check(up).dtype({gate.dtype}).same_shape(gate);
  return {check_code_rows(check, gate, scale, group_size), {}, {}};
}

// On the CPU: a row, in the dtype that is quantised.
template <class T>
void silu_mul_row(const T* gate, const T* up, int64_t k, T* y) {
  for (int64_t column = 0; column < k; ++column) {
    const float rounded = to_float(from_float<T>(silu(to_float(gate[column]))));
    y[column] = from_float<T>(rounded * to_float(up[column]));
  }
}

// On the CPU: everything.
template <class Codes, class Threads>
void quantize_silu_mul_rows(const SiluMulParams& params, const Threads& threads) {
  const auto& [rows, gate, up] = params;
  dispatch_float(rows.dtype, [&](auto element) {
    using T = decltype(element);
    quantize_made_rows<Codes, T>(rows, threads, [&](int64_t row, T* y) {
      silu_mul_row(static_cast<const T*>(gate.data) + row * gate.stride,
                   static_cast<const T*>(up.data) + row * up.stride, rows.k, y);
    });
  });
}

}  // namespace effllm
