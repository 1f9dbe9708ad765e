// The operands of decode attention in a warp's registers: 8 rows of Q, and K and V of a tile of
// keys, of any dtype, straight from the cache.
//
// With g = lane / 4, c = lane % 4, octets of 8 neighbouring dims, units of the 1, 2 or 4 octets
// that one load brings (16 bytes, where a row has them), and for each 16 keys of the tile:
//
//   S^T[16 keys, 8 rows] = K Q^T   lane (g, c) owns units 4j + c of keys 2g and 2g + 1, rows g and
//                                  g + 8 of the fragment, and of row g of Q: both sides sum over
//                                  dims in one, strange, order
//   P^T                            movmatrix turns S^T's accumulators into B fragments
//   O^T[dims, 8 rows] += V^T P^T   lane (g, c) owns units 8j + g of keys 4c .. 4c + 3, paired 0
//                                  with 2 and 1 with 3: first dims of octet pairs are rows g of the
//                                  fragment, second ones rows g + 8
//
// Where a key lies costs some forty instructions, so that one lane finds it for all that load from
// it, and leaves it in shared memory.
//
// Codes are multiplied in float16, which holds them exactly. Scales meet the scores:
//
//   x = (q.code) * k_scale      before everything else that happens to a score
//   o += (p * v_scale) code     after p has gone into the row's sum
//
// V's codes of int4 stay 1 + code / 64, two instructions for a pair of them; what one more tile
// with 1 + zero / 64 in all dims sums up to is taken off the output. Not so K's, which would cost
// scores four of their 24 bits.
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

// What the lanes of a warp tell each other: of the keys of a tile, and what rows see.
template <class Config>
struct DecodeTileKeys {
  static constexpr int kWords = Config::kQuantized ? Config::kTileKeys : 4;

  alignas(16) int64_t k_bytes[Config::kTileKeys];  // where rows begin in the cache
  int64_t v_bytes[Config::kTileKeys];
  uint32_t k_words[kWords], v_words[kWords];  // scales of quantised caches
  KeyRange visible[Config::kRows];
};

template <class Config>
class DecodeKv {
  using Element = typename Config::Element;
  using Octet = KvOctet<typename Config::Kv>;
  using Operand = typename Octet::Operand;
  static constexpr int kGroups = Config::kTileKeys / 16;
  static constexpr int kKeyOctets = Config::kHeadDim / 32;    // of a key in a lane, for K
  static constexpr int kValueOctets = Config::kHeadDim / 64;  // and for V
  static constexpr int kMaxUnit = Config::kNarrow ? 1 : 4 / Octet::kWords;
  static constexpr int kValueUnit = std::min(kMaxUnit, kValueOctets);  // octets of a load
  static constexpr int64_t kCacheElementBytes = Config::kQuantized ? 1 : sizeof(Element);

 public:
  static constexpr int kKeyUnit = std::min(kMaxUnit, kKeyOctets);
  static constexpr int kKeyUnitDims = kKeyUnit * 8;  // D is a multiple of it
  static constexpr int kDimTiles = Config::kHeadDim / 16;
  // Dims first_dim(t) and + kPairDistance; rows 2c, 2c + 1. Of int4, one more tile: what the others
  // have too much.
  using Output = float[kDimTiles + Config::kInt4][4];
  using Scores = float[kGroups][4];
  static constexpr int kPairDistance = Octet::kPairDistance;

  __device__ __forceinline__ DecodeKv(const PagedAttentionArgs& args, const Sequence& sequence,
                                      int kv_head, DecodeTileKeys<Config>& keys_of_warp)
      : args_(args),
        sequence_(sequence),
        keys_(keys_of_warp),
        kv_head_(kv_head),
        key_lane_(threadIdx.x % Config::kTileKeys),
        group_lane_(threadIdx.x % 32 / 4),
        quad_lane_(threadIdx.x % 4) {}

  // The key of score i of a group, from the first of the tile on.
  __device__ __forceinline__ int key_of_score(int group, int i) const {
    return group * 16 + group_lane_ * 2 + i / 2;
  }

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

  // Asks the page table for this lane's key of the tile that begins at `first_key`. Keys past the
  // end are read as the last one: slots without a key may hold NaN, which a weight of 0 would not
  // silence in V.
  __device__ __forceinline__ void find_page(int first_key, int end) {
    // Unsigned: a tile far past the end may begin beyond 2^31.
    const uint32_t key = min(static_cast<uint32_t>(first_key) + key_lane_, end - 1u);
    const uint32_t entry = args_.page_size_divisor.quotient(key);
    page_ = sequence_.page_row[entry];
    slot_ = key - entry * static_cast<uint32_t>(args_.page_size);
  }

  // Where the keys lie whose pages were asked for.
  __device__ __forceinline__ void locate_keys() {
    const KeyLocation location(args_, page_, slot_);
    __syncwarp();  // all have read what is there
    keys_.k_bytes[key_lane_] = location.k_offset(args_, kv_head_) * kCacheElementBytes;
    keys_.v_bytes[key_lane_] = location.v_offset(args_, kv_head_) * kCacheElementBytes;
    if constexpr (Config::kQuantized) {
      k_word_ = location.word(args_.k_scales, kv_head_);
      v_word_ = location.word(args_.v_scales, kv_head_);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_keys() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto bytes =
          *reinterpret_cast<const longlong2*>(&keys_.k_bytes[key_of_score(group, 0)]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const char* row = static_cast<const char*>(args_.k_cache) + (n == 0 ? bytes.x : bytes.y);
#pragma unroll
        for (int o = 0; o < kKeyOctets; o += kKeyUnit) {
          load_unit<kKeyUnit>(k_[group][n], o, key_octet(o), row);
        }
      }
    }
  }

  __device__ __forceinline__ void load_values() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        const auto bytes =
            *reinterpret_cast<const longlong2*>(&keys_.v_bytes[group * 16 + quad_lane_ * 4 + n]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const char* row = static_cast<const char*>(args_.v_cache) + (i == 0 ? bytes.x : bytes.y);
#pragma unroll
          for (int o = 0; o < kValueOctets; o += kValueUnit) {
            load_unit<kValueUnit>(v_[group][n + i], o, value_octet(o), row);
          }
        }
      }
    }
  }

  // For each group (key 2g, row 2c) (key 2g, row 2c + 1) (key 2g + 1, row 2c) (key 2g + 1, row
  // 2c + 1), of what load_keys brought, whose registers are free afterwards.
  __device__ __forceinline__ void compute_scores(Scores& scores) {
    if constexpr (Config::kQuantized) {
      __syncwarp();  // the words of the tile before have been read
      keys_.k_words[key_lane_] = k_word_;
      keys_.v_words[key_lane_] = v_word_;
      __syncwarp();
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      [[maybe_unused]] float scale[2];
      typename Octet::Bias bias[2];
      if constexpr (Config::kQuantized) {
        const auto words = *reinterpret_cast<const uint2*>(&keys_.k_words[key_of_score(group, 0)]);
        scale[0] = Octet::scale(words.x), scale[1] = Octet::scale(words.y);
        bias[0] = Octet::bias(words.x), bias[1] = Octet::bias(words.y);
      }
#pragma unroll
      for (int o = 0; o < kKeyOctets; ++o) {
        uint32_t low[4], high[4];  // of keys 2g and 2g + 1
        Octet::decode(&k_[group][0][o * Octet::kWords], bias[0], low);
        Octet::decode(&k_[group][1][o * Octet::kWords], bias[1], high);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t k[4] = {low[i], high[i], low[i + 1], high[i + 1]};
          ptx::mma_m16n8k16<Operand>(scores[group], k, query_[o][i], query_[o][i + 1]);
        }
      }
      if constexpr (Config::kQuantized) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[group][i] *= scale[i / 2] * query_factor_[i % 2];
      }
    }
  }

  // Weights times the scales of their values. If the result is true, the output so far is to be
  // multiplied by `factor`: the same in the whole warp.
  __device__ __forceinline__ bool scale_weights(Scores& weights, float& factor) {
    static_assert(Config::kQuantized);
    float scales[kGroups][2], largest = 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto words = *reinterpret_cast<const uint2*>(&keys_.v_words[key_of_score(group, 0)]);
      scales[group][0] = Octet::scale(words.x);
      scales[group][1] = Octet::scale(words.y);
      largest = fmaxf(largest, fmaxf(fabsf(scales[group][0]), fabsf(scales[group][1])));
    }
    const bool grown = value_exponent_.grow(largest, factor);
    const float inverse = value_exponent_.inverse();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[group][i] *= scales[group][i / 2] * inverse;
    }
    return grown;
  }

  __device__ __forceinline__ void accumulate(Output& output, const Scores& weights) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto& of_keys = weights[group];
      const uint32_t p0 = ptx::movmatrix_trans(ptx::pack_pair<Operand>(of_keys[0], of_keys[1]));
      const uint32_t p1 = ptx::movmatrix_trans(ptx::pack_pair<Operand>(of_keys[2], of_keys[3]));
#pragma unroll
      for (int o = 0; o < kValueOctets; ++o) {
        uint32_t even[2][4], odd[2][4];  // first and second dims, of keys (0, 2) and (1, 3)
        const int word = o * Octet::kWords;
        decode_pair(&v_[group][0][word], &v_[group][2][word], even);
        decode_pair(&v_[group][1][word], &v_[group][3][word], odd);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t v[4] = {even[0][i], even[1][i], odd[0][i], odd[1][i]};
          ptx::mma_m16n8k16<Operand>(output[o * 4 + i], v, p0, p1);
        }
      }
      if constexpr (Config::kInt4) {
        const auto words =
            *reinterpret_cast<const uint4*>(&keys_.v_words[group * 16 + quad_lane_ * 4]);
        const uint32_t even =
            ptx::pack_pair<Operand>(Octet::zero_steps(words.x), Octet::zero_steps(words.z));
        const uint32_t odd =
            ptx::pack_pair<Operand>(Octet::zero_steps(words.y), Octet::zero_steps(words.w));
        const uint32_t zeros[4] = {even, even, odd, odd};
        ptx::mma_m16n8k16<Operand>(output[kDimTiles], zeros, p0, p1);
      }
    }
  }

  // Takes back what was left in the sums: the power of two, and what is too much.
  __device__ __forceinline__ void finish(Output& output) const {
    if constexpr (Config::kQuantized) {
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = output[tile][i];
          if constexpr (Config::kInt4) sum = (sum - output[kDimTiles][i]) * (1.f / Octet::kStep);
          sum *= value_exponent_.factor();
        }
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

  // An octet of V of two keys: pairs of these, of the first and of the second dims of octet pairs.
  static __device__ __forceinline__ void decode_pair(const uint32_t* a, const uint32_t* b,
                                                     uint32_t (&pairs)[2][4]) {
    constexpr uint32_t kLow = 0x5410, kHigh = 0x7632;  // halves of both words
    if constexpr (Config::kInt4) {
      const uint32_t first = ptx::Permute()(a[0], b[0], kLow);
      const uint32_t second = ptx::Permute()(a[0], b[0], kHigh);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[0][i] = Octet::steps(first, i);
        pairs[1][i] = Octet::steps(second, i);
      }
    } else {
      uint32_t of_a[4], of_b[4];
      Octet::decode(a, {}, of_a);
      Octet::decode(b, {}, of_b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[0][i] = ptx::Permute()(of_a[i], of_b[i], kLow);
        pairs[1][i] = ptx::Permute()(of_a[i], of_b[i], kHigh);
      }
    }
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

  const PagedAttentionArgs& args_;
  const Sequence& sequence_;
  DecodeTileKeys<Config>& keys_;
  const int kv_head_;
  const uint32_t key_lane_;  // of the tile, the key that this lane finds
  const int group_lane_, quad_lane_;
  int32_t page_;
  uint32_t slot_;
  uint32_t query_[kKeyOctets][4];
  uint32_t k_[kGroups][2][kKeyOctets * Octet::kWords];
  uint32_t v_[kGroups][4][kValueOctets * Octet::kWords];
  // Of quantised caches. Rows are 2c and 2c + 1.
  float query_factor_[2];
  uint32_t k_word_, v_word_;  // of this lane's key
  ValueExponent value_exponent_;
};

}  // namespace effllm
