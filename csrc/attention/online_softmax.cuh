// Softmax over keys that arrive tile by tile, in base 2: with x = log2(e) * score, a row keeps the
// maximum of x and the sum of 2^(x - maximum), and rescales both when the maximum grows.
#pragma once

#include <cmath>

#include "attention/paged_attention.h"
#include "ptx/cvt.cuh"

namespace effllm {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// A masked score is -inf. The maximum of no scores is finite, so that a row (or tile) without keys
// gets weights 2^(-inf - kNoMaximum) = 0 where an infinite one would give NaN.
inline constexpr float kMaskedScore = -INFINITY;
inline constexpr float kNoMaximum = -1e30f;

// q.k -> x = log2(e) * (scale * q.k), or log2(e) * softcap * tanh(scale * q.k / softcap).
class ScoreMap {
 public:
  __device__ __forceinline__ explicit ScoreMap(const PagedAttentionParams& params)
      : slope_(kLog2E * params.scale),
        cap_(kLog2E * params.softcap),
        tanh_slope_(params.softcap > 0.f ? params.scale / params.softcap : 0.f) {}

  // Where x is q.k times a positive number: that number, to be left to who takes powers.
  __device__ __forceinline__ bool is_positive_factor() const { return cap_ <= 0.f && slope_ > 0.f; }
  __device__ __forceinline__ float factor() const { return slope_; }

  // In place. One branch per tile, not per score.
  template <int kTiles>
  __device__ __forceinline__ void apply(float (&scores)[kTiles][4]) const {
    if (cap_ > 0.f) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (float& x : scores[tile]) x = capped(x);
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (float& x : scores[tile]) x *= slope_;
      }
    }
  }

 private:
  // tanh.approx is good to 2^-11 only. 1 - 2 / (1 + e^2y) is good to 2e-7, which for small y is not
  // small beside tanh(y): there it is a polynomial, to 1e-7 of its value.
  __device__ __forceinline__ float capped(float qk) const {
    const float y = qk * tanh_slope_, y2 = y * y;
    const float small = qk * slope_ * (1.f + y2 * (-1.f / 3.f + y2 * (2.f / 15.f)));
    const float large = 1.f - __fdividef(2.f, 1.f + ptx::exp2_approx(2.f * kLog2E * y));
    return y2 < 0.01f ? small : cap_ * large;
  }

  float slope_, cap_, tanh_slope_;
};

// The score of a query head's sink.
__device__ __forceinline__ float sink_score(const PagedAttentionParams& params, int head) {
  return params.sinks != nullptr ? kLog2E * params.sinks[head] : kMaskedScore;
}

// What the weights of a row are powers of 2 against, by its lse. `sink2` is its sink's score. Where
// all scores are -inf, any finite number does.
__device__ __forceinline__ float weight_base(float lse, float sink2) {
  const float lse2 = kLog2E * lse;
  if (lse == -INFINITY) return 0.f;
  return sink2 == kMaskedScore ? lse2 : lse2 + log2f(1.f + ptx::exp2_approx(sink2 - lse2));
}

struct SoftmaxRow {
  float maximum = kNoMaximum;
  float sum = 0.f;

  // The row has seen no key. A NaN sum is not empty: NaN in, NaN out.
  __device__ __forceinline__ bool empty() const { return sum == 0.f; }
  // `sink2` is one more score to divide by, that of a sink; kMaskedScore if there is none.
  __device__ __forceinline__ float inverse_sum(float sink2) const {
    return empty() ? 0.f : 1.f / (sum + ptx::exp2_approx(sink2 - maximum));
  }
  __device__ __forceinline__ float lse2() const {
    return empty() ? -INFINITY : maximum + log2f(sum);
  }
};

}  // namespace effllm
