// How a paged cache holds keys and values in 8 or 4 bits.
//
// A row, the D elements of one token and KV head, becomes codes in the cache and one 32-bit word
// beside the pages, which moves and is shared with them:
//
//   cache dtype     codes of a row                 word                   an element
//   float8_e4m3fn   D bytes                        float32 scale          scale * code
//   int8            D bytes, -127 .. 127           float32 scale          scale * code
//   uint8 (int4)    D / 2 bytes, low nibble first  float16 scale, zero    scale * (code - zero)
//
//   scales  [NP, P, HKV] float32, or [NP, P, HKV, 2] float16   (usual memory: [NP, HKV, P])
//
// The scale is max|x| / 448 or / 127, at least 2^-126, and 1 for a row of zeros. That of int4 is
// (max - min) / 15, at least max|x| / 240 and 2^-14, and its zero the integer next to -min / scale:
// asymmetric codes err less and cost nothing, for kernels subtract a number anyway; code - zero is
// exact in float16 and, as |zero| is at most 240, in bfloat16. Codes round x / scale to nearest
// even and saturate: no NaN code is ever stored, and kernels need not know them. A row that holds
// NaN or infinity gets the scale NaN: what sees it is NaN. In int4, values beyond those of float16
// saturate too.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/view.h"
#include "quant/fp8_layout.h"

namespace effllm {

inline constexpr float kInt8Max = 127.0f;
inline constexpr float kInt4MinScale = 0x1p-14f, kInt4MaxZero = 240.0f, kFloat16Max = 65504.0f;

constexpr bool is_quantized_kv(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kInt8 || dtype == DType::kUInt8;
}

// The words of a cache. Strides count words.
struct KvScales {
  uint32_t* words;  // null: the cache is not quantised
  int64_t stride_page, stride_slot, stride_head;
};

// Matches one cache and its scales; symbols are those of the op.
inline KvScales check_kv_cache(Check& check, const View& cache, const std::optional<View>& scale,
                               const char* scale_name, Sym& pages, Sym& page_size, Sym& heads,
                               Sym& dim) {
  if (cache.dtype == DType::kUInt8) {
    check.that(*dim % 2 == 0, std::string(cache.name) +
                                  " of uint8, two codes a byte, needs an even " + dim.name() +
                                  ", got " + std::to_string(*dim));
    check(cache).shape({pages, page_size, heads, {"D / 2", *dim / 2}}).last_stride_one();
  } else {
    check(cache).shape({pages, page_size, heads, dim}).last_stride_one();
  }

  const bool quantized = is_quantized_kv(cache.dtype);
  check.that(scale.has_value() == quantized, std::string(scale_name) + " must be " +
                                                 (quantized ? "given" : "None") +
                                                 " for a cache of " + dtype_name(cache.dtype) +
                                                 ", got " + (quantized ? "None" : "a tensor"));
  if (!quantized) return {};
  if (cache.dtype == DType::kUInt8) {
    check(*scale)
        .dtype({DType::kFloat16})
        .shape({pages, page_size, heads, {"2", 2}})
        .last_stride_one()
        .aligned(sizeof(uint32_t), 2);
    return {scale->data_as<uint32_t>(), scale->stride(0) / 2, scale->stride(1) / 2,
            scale->stride(2) / 2};
  }
  check(*scale).dtype({DType::kFloat32}).shape({pages, page_size, heads});
  return {scale->data_as<uint32_t>(), scale->stride(0), scale->stride(1), scale->stride(2)};
}

// What a word says: an element is scale * (code - zero).
struct KvDecoding {
  float scale, zero;
};

// The codecs of one row, element by element, for the CPU.
struct KvE4M3 {
  template <class T>
  static uint32_t encode(const T* row, int64_t dim, uint8_t* codes) {
    const float scale = symmetric_scale(max_magnitude_bits(row, dim), kE4M3Max);
    encode_e4m3(row, dim, scale, codes);
    return std::bit_cast<uint32_t>(scale);
  }

  static KvDecoding decoding(uint32_t word) { return {std::bit_cast<float>(word), 0.0f}; }
};

struct KvInt8 {
  template <class T>
  static uint32_t encode(const T* row, int64_t dim, uint8_t* codes) {
    const float scale = symmetric_scale(max_magnitude_bits(row, dim), kInt8Max);
    const bool finite = scale == scale;
    for (int64_t d = 0; d < dim; ++d) {
      const float code = std::nearbyint(finite ? to_float(row[d]) / scale : 0.0f);
      codes[d] =
          static_cast<uint8_t>(static_cast<int8_t>(std::min(std::max(code, -kInt8Max), kInt8Max)));
    }
    return std::bit_cast<uint32_t>(scale);
  }

  static KvDecoding decoding(uint32_t word) { return {std::bit_cast<float>(word), 0.0f}; }
};

struct KvInt4 {
  template <class T>
  static uint32_t encode(const T* row, int64_t dim, uint8_t* codes) {
    const auto bounded = [&](int64_t d) {
      return std::min(std::max(to_float(row[d]), -kFloat16Max), kFloat16Max);
    };
    if (max_magnitude_bits(row, dim) >= kInfinityBits) {
      std::memset(codes, 0, dim / 2);
      return 0x7e007e00u;  // NaN, NaN
    }
    float low = kFloat16Max, high = -kFloat16Max;
    for (int64_t d = 0; d < dim; ++d) {
      low = std::min(low, bounded(d));
      high = std::max(high, bounded(d));
    }
    const float least = std::max(std::max(high, -low) / kInt4MaxZero, kInt4MinScale);
    const float16 half_scale = from_float<float16>(std::max((high - low) / 15.0f, least));
    const float scale = to_float(half_scale);
    const float zero =
        std::min(std::max(-std::nearbyint(low / scale), -kInt4MaxZero), kInt4MaxZero);
    const auto code = [&](int64_t d) {
      const float steps = std::nearbyint(bounded(d) / scale) + zero;
      return static_cast<int>(std::min(std::max(steps, 0.0f), 15.0f));
    };
    for (int64_t d = 0; d < dim; d += 2) {
      codes[d / 2] = static_cast<uint8_t>(code(d) | code(d + 1) << 4);
    }
    return half_scale.bits | static_cast<uint32_t>(from_float<float16>(zero).bits) << 16;
  }

  static KvDecoding decoding(uint32_t word) {
    return {to_float(float16{static_cast<uint16_t>(word)}),
            to_float(float16{static_cast<uint16_t>(word >> 16)})};
  }
};

// Calls `body` with the codec of `dtype`, a checked dtype of a quantised cache.
template <class Body>
decltype(auto) dispatch_kv_codec(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat8E4M3:
      return std::forward<Body>(body)(KvE4M3{});
    case DType::kInt8:
      return std::forward<Body>(body)(KvInt8{});
    default:
      return std::forward<Body>(body)(KvInt4{});
  }
}

}  // namespace effllm
