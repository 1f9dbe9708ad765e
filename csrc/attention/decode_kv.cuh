// The operands of decode attention in a warp's registers: 8 rows of Q, and K and V of 16 keys, of
// any dtype, straight from the cache.
//
// With g = lane / 4, c = lane % 4, octets of 8 neighbouring dims, and units of the 1, 2 or 4 octets
// that one load brings (16 bytes, where a row has them):
//
//   S^T[16 keys, 8 rows] = K Q^T   lane (g, c) owns units 4j + c of keys g and g + 8, and of row g
//                                  of Q: both sides sum over dims in one, strange, order
//   P^T                            movmatrix turns S^T's accumulators into B fragments
//   O^T[dims, 8 rows] += V^T P^T   lane (g, c) owns units 8j + g of keys 2c, 2c + 1, 2c + 8 and
//                                  2c + 9; byte_perm pairs two keys of one dim: first dims of
//                                  octet pairs are rows g of the fragment, second ones rows g + 8
//
// Codes are multiplied as they are, in float16, which holds them exactly. Scales meet the scores:
//
//   x = (q.code) * k_scale      before everything else that happens to a score
//   o += (p * v_scale) code     after p has gone into the row's sum
//
// Q is brought to [1, 2) by powers of two that are taken back: it need not fit into float16.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/decode_split.cuh"
#include "attention/value_exponent.cuh"
#include "cuda/vec.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/load.cuh"
#include "ptx/mma.cuh"
#include "quant/dequant.cuh"

namespace effllm {

template <class Config>
class DecodeKv {
  using Element = typename Config::Element;
  using Octet = KvOctet<typename Config::Kv>;
  using Operand = typename Octet::Operand;
  static constexpr int kKeyOctets = Config::kHeadDim / 32;    // of a key in a lane, for K
  static constexpr int kValueOctets = Config::kHeadDim / 64;  // and for V
  static constexpr int kMaxUnit = Config::kNarrow ? 1 : 4 / Octet::kWords;
  static constexpr int kValueUnit = std::min(kMaxUnit, kValueOctets);  // octets of a load
  static constexpr int64_t kCacheElementBytes = Config::kQuantized ? 1 : sizeof(Element);

 public:
  static constexpr int kKeyUnit = std::min(kMaxUnit, kKeyOctets);
  static constexpr int kKeyUnitDims = kKeyUnit * 8;  // D is a multiple of it
  static constexpr int kDimTiles = Config::kHeadDim / 16;
  using Output = float[kDimTiles][4];  // dims first_dim(t) and + kPairDistance; rows 2c, 2c + 1
  static constexpr int kPairDistance = Octet::kPairDistance;

  __device__ __forceinline__ DecodeKv(const PagedAttentionArgs& args, const Sequence& sequence,
                                      int kv_head)
      : args_(args),
        sequence_(sequence),
        kv_head_(kv_head),
        group_lane_(threadIdx.x % 32 / 4),
        quad_lane_(threadIdx.x % 4) {}

  // The first of the two dims that this lane holds of a tile of the output.
  __device__ __forceinline__ int first_dim(int tile) const {
    const int within = kPairDistance == 1 ? tile % 4 * 2 : tile % 4;
    return value_octet(tile / 4) * 8 + within;
  }

  // This lane's part of packed row first_row + g, zeros past the last.
  __device__ __forceinline__ void load_queries(int first_row, int num_rows) {
    const int row = first_row + group_lane_;
    const int query_idx = static_cast<int>(args_.group_divisor.quotient(row));
    const int head = kv_head_ * args_.group + row - query_idx * args_.group;
    const auto* q = static_cast<const Element*>(args_.q) +
                    (sequence_.first_token + query_idx) * args_.stride_q_token +
                    head * args_.stride_q_head;
    uint4 octets[kKeyOctets];
#pragma unroll
    for (int o = 0; o < kKeyOctets; ++o) {
      const int octet = key_octet(o);
      octets[o] = row < num_rows && has_octet(octet)
                      ? *reinterpret_cast<const uint4*>(q + octet * 8)
                      : uint4{};
    }
    if constexpr (Config::kQuantized) {
      convert_queries(octets);
    } else {
#pragma unroll
      for (int o = 0; o < kKeyOctets; ++o) {
        query_[o][0] = octets[o].x, query_[o][1] = octets[o].y;
        query_[o][2] = octets[o].z, query_[o][3] = octets[o].w;
      }
    }
  }

  // Keys past the end are read as the last one: slots without a key may hold NaN, which a weight of
  // 0 would not silence in V.
  __device__ __forceinline__ void load_keys(int first_key, int end) {
    [[maybe_unused]] KeyLocation of_word{};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int key = min(first_key + n * 8 + group_lane_, end - 1);
      const KeyLocation location = locate_key(args_, sequence_.page_row, key);
      if constexpr (Config::kQuantized) {
        if (n == 0 || quad_lane_ % 2 == 1) of_word = location;
      }
      const char* row = static_cast<const char*>(args_.k_cache) +
                        location.k_offset(args_, kv_head_) * kCacheElementBytes;
#pragma unroll
      for (int o = 0; o < kKeyOctets; o += kKeyUnit)
        load_unit<kKeyUnit>(k_[n], o, key_octet(o), row);
    }
    if constexpr (Config::kQuantized) {
      // One word for each lane: those of keys g and g + 8 for K, then for V.
      const KvScales& scales = quad_lane_ < 2 ? args_.k_scales : args_.v_scales;
      scale_word_ = of_word.word(scales, kv_head_);
    }
  }

  __device__ __forceinline__ void load_values(int first_key, int end) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int key = min(first_key + n / 2 * 8 + quad_lane_ * 2 + n % 2, end - 1);
      const char* row =
          static_cast<const char*>(args_.v_cache) +
          locate_key(args_, sequence_.page_row, key).v_offset(args_, kv_head_) * kCacheElementBytes;
#pragma unroll
      for (int o = 0; o < kValueOctets; o += kValueUnit) {
        load_unit<kValueUnit>(v_[n], o, value_octet(o), row);
      }
    }
  }

  // scores: (key g, row 2c) (key g, row 2c + 1) (key g + 8, row 2c) (key g + 8, row 2c + 1), of
  // what load_keys brought, whose registers are free afterwards.
  __device__ __forceinline__ void compute_scores(float (&scores)[4]) {
    float scale[2];
    typename Octet::Bias bias[2];
    if constexpr (Config::kQuantized) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t word = __shfl_sync(~0u, scale_word_, n, 4);
        scale[n] = Octet::scale(word);
        bias[n] = Octet::bias(word);
      }
      share_value_words();
    }
#pragma unroll
    for (int o = 0; o < kKeyOctets; ++o) {
      uint32_t low[4], high[4];  // of keys g and g + 8
      Octet::decode(&k_[0][o * Octet::kWords], bias[0], low);
      Octet::decode(&k_[1][o * Octet::kWords], bias[1], high);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t k[4] = {low[i], high[i], low[i + 1], high[i + 1]};
        ptx::mma_m16n8k16<Operand>(scores, k, query_[o][i], query_[o][i + 1]);
      }
    }
    if constexpr (Config::kQuantized) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[i] *= scale[i / 2] * query_factor_[i % 2];
    }
  }

  // Weights times the scales of their values. If the result is true, the output so far is to be
  // multiplied by `factor`: the same in the whole warp.
  __device__ __forceinline__ bool scale_weights(float (&weights)[4], float& factor) {
    static_assert(Config::kQuantized);
    const float largest = fmaxf(fabsf(value_scale_[0]), fabsf(value_scale_[1]));
    const bool grown = value_exponent_.grow(largest, factor);
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] *= value_scale_[i / 2] * value_exponent_.inverse();
    return grown;
  }

  __device__ __forceinline__ void accumulate(Output& output, const float (&weights)[4]) const {
    const uint32_t p0 = ptx::movmatrix_trans(ptx::pack_pair<Operand>(weights[0], weights[1]));
    const uint32_t p1 = ptx::movmatrix_trans(ptx::pack_pair<Operand>(weights[2], weights[3]));
#pragma unroll
    for (int o = 0; o < kValueOctets; ++o) {
      uint32_t pairs[4][4];  // of keys 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
      for (int n = 0; n < 4; ++n)
        Octet::decode(&v_[n][o * Octet::kWords], value_bias_[n], pairs[n]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t v[4] = {__byte_perm(pairs[0][i], pairs[1][i], 0x5410),
                               __byte_perm(pairs[0][i], pairs[1][i], 0x7632),
                               __byte_perm(pairs[2][i], pairs[3][i], 0x5410),
                               __byte_perm(pairs[2][i], pairs[3][i], 0x7632)};
        ptx::mma_m16n8k16<Operand>(output[o * 4 + i], v, p0, p1);
      }
    }
  }

  // Takes the power of two back.
  __device__ __forceinline__ void finish(Output& output) const {
    if constexpr (Config::kQuantized) {
#pragma unroll
      for (auto& tile : output) {
#pragma unroll
        for (float& sum : tile) sum *= value_exponent_.factor();
      }
    }
  }

 private:
  __device__ __forceinline__ bool has_octet(int octet) const { return octet * 8 < args_.head_dim; }

  __device__ __forceinline__ int key_octet(int o) const {
    return (o / kKeyUnit * 4 + quad_lane_) * kKeyUnit + o % kKeyUnit;
  }

  __device__ __forceinline__ int value_octet(int o) const {
    return (o / kValueUnit * 8 + group_lane_) * kValueUnit + o % kValueUnit;
  }

  template <int kUnit, int kWords>
  __device__ __forceinline__ void load_unit(uint32_t (&words)[kWords], int o, int octet,
                                            const char* row) {
    constexpr int kUnitWords = kUnit * Octet::kWords;
    uint32_t unit[kUnitWords] = {};
    if (has_octet(octet)) ptx::load_streaming<kUnitWords>(unit, row + octet * Octet::kWords * 4);
#pragma unroll
    for (int i = 0; i < kUnitWords; ++i) words[o * Octet::kWords + i] = unit[i];
  }

  // To float16, the largest of the row in [1, 2): exact but for bits that lie below 2^-24.
  __device__ __forceinline__ void convert_queries(const uint4 (&octets)[kKeyOctets]) {
    uint32_t magnitude = 0;
#pragma unroll
    for (int o = 0; o < kKeyOctets; ++o) {
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        magnitude = max(magnitude, __float_as_uint(element(octets[o], d)) & 0x7fffffffu);
      }
    }
    magnitude = max(magnitude, __shfl_xor_sync(~0u, magnitude, 1));
    magnitude = max(magnitude, __shfl_xor_sync(~0u, magnitude, 2));
    const uint32_t exponent =
        min(max(magnitude >> 23, 1u), 253u);  // both powers are normal numbers
    const float inverse = __uint_as_float((254u - exponent) << 23);
#pragma unroll
    for (int o = 0; o < kKeyOctets; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = kPairDistance == 1 ? 2 * i : i;
        query_[o][i] = ptx::pack_pair<float16>(element(octets[o], d) * inverse,
                                               element(octets[o], d + kPairDistance) * inverse);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // from the lanes of rows 2c and 2c + 1
      const int lane = (quad_lane_ * 2 + i) * 4;
      query_factor_[i] = __uint_as_float(__shfl_sync(~0u, exponent << 23, lane));
    }
  }

  static __device__ __forceinline__ float element(const uint4& octet, int d) {
    return device_to_float(reinterpret_cast<const device_t<Element>*>(&octet)[d]);
  }

  // Of the words that lanes (g, 2) and (g, 3) hold: scales for keys g and g + 8, as weights come,
  // and biases for keys 2c, 2c + 1, 2c + 8, 2c + 9, as values come.
  __device__ __forceinline__ void share_value_words() {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      value_scale_[n] = Octet::scale(__shfl_sync(~0u, scale_word_, n + 2, 4));
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if constexpr (std::is_same_v<typename Config::Kv, KvInt4>) {
        const int lane = (quad_lane_ * 2 + n % 2) * 4 + n / 2 + 2;
        value_bias_[n] = Octet::bias(__shfl_sync(~0u, scale_word_, lane));
      }
    }
  }

  const PagedAttentionArgs& args_;
  const Sequence& sequence_;
  const int kv_head_, group_lane_, quad_lane_;
  uint32_t query_[kKeyOctets][4];
  uint32_t k_[2][kKeyOctets * Octet::kWords], v_[4][kValueOctets * Octet::kWords];
  typename Octet::Bias value_bias_[4];
  // Of quantised caches. Rows are 2c and 2c + 1, keys g and g + 8.
  float query_factor_[2];
  uint32_t scale_word_;
  float value_scale_[2];
  ValueExponent value_exponent_;
};

}  // namespace effllm
