// Element types: our enum, its names, and the small floats that C++20 does not have.
#pragma once

#include <bit>
#include <cstdint>

namespace effllm {

enum class DType : uint8_t {
  kUInt8,
  kInt8,
  kInt32,
  kInt64,
  kFloat8E4M3,
  kFloat16,
  kBFloat16,
  kFloat32,
  kOther,  // a type that no op takes; it exists so that error messages can be raised about it
};

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return "uint8";
    case DType::kInt8:
      return "int8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kOther:
      break;
  }
  return "another dtype";
}

constexpr int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kFloat8E4M3:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    case DType::kInt64:
      return 8;
    case DType::kOther:
      break;
  }
  return 0;  // nobody knows; no check lets it pass
}

// Storage only: arithmetic is done in float. Conversions round to nearest even and are written
// without branches on the common path, so that compilers vectorise loops over them.
struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

// The OCP 8-bit float without infinities: up to 448, NaN is 0x7f and 0xff.
struct float8_e4m3 {
  uint8_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Read as a float, the shifted magnitude is off by 2^112: the exponent biases differ by 127 - 15.
  // The product is exact, also for subnormals.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t inf_or_nan = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | inf_or_nan | sign);
}

constexpr float to_float(float8_e4m3 value) {
  const uint32_t sign = (value.bits & 0x80u) << 24;
  const uint32_t magnitude = value.bits & 0x7fu;
  // As for float16: exponent biases differ by 127 - 7.
  const float scaled = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  const uint32_t nan = magnitude == 0x7fu ? 0x7fc00000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | nan | sign);
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // rounding could turn a NaN into inf
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline float16 from_float<float16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below the normal halves: 0.5f has the ulp 2^-24 of their subnormals, so adding it rounds.
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// Saturates: beyond 448 there is nothing but NaN, of which GPUs write the positive one alone.
template <>
inline float8_e4m3 from_float<float8_e4m3>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  const uint32_t bounded = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
  // Below the normal numbers: 2^14 has the ulp 2^-9 of their subnormals, so adding it rounds.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(bounded) + 0x1p14f) - 0x46800000u;
  const uint32_t normal = (bounded - (120u << 23) + 0x7ffffu + ((bounded >> 20) & 1u)) >> 20;
  const uint32_t finite = bounded < 0x3c800000u ? subnormal : normal;
  return {static_cast<uint8_t>(magnitude > 0x7f800000u ? 0x7fu : sign | finite)};
}

// Element `index` of a buffer whose type is known only at run time; for data off the hot path.
inline float load_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const float16*>(data)[index]);
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

}  // namespace effllm
