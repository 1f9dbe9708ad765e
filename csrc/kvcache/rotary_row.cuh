// The rows of one token in rope_kv_append's kernel: how pairs rotate, and where each row goes.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/vec.cuh"
#include "kvcache/kv_row.cuh"
#include "kvcache/rope_kv_append.h"

namespace effllm {

// Floats from a table, 16 bytes at a time; NaN where there is none.
template <int kCount>
__device__ __forceinline__ void load_table(const float* table, int idx, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float4 four{NAN, NAN, NAN, NAN};
    if (table != nullptr) four = *reinterpret_cast<const float4*>(table + idx + i);
    values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
  }
}

// A head of q or k, or one of v, which does not rotate: half = 0.
template <class T, int kVector>
struct RotaryRow {
  using Vector = RowVector<T, kVector>;

  const device_t<T>* row;
  const float *cos, *sin;  // of the token's position; null if it is out of range
  int dim, half;
  bool interleaved;

  // Elements d .. d + kVector - 1, rotated and rounded.
  __device__ __forceinline__ Vector load(int d) const {
    Vector x = Vector::load(row, d, dim);
    if (d >= 2 * half) return x;
    if constexpr (kVector == 8) {
      return interleaved ? rotate_pairs(x, d) : rotate_halves(x, d);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int element = d + i;
        const bool is_first = interleaved ? i == 0 : element < half;
        const int idx = interleaved ? element / 2 : is_first ? element : element - half;
        const int partner = interleaved ? element ^ 1 : is_first ? element + half : idx;
        const float c = cos == nullptr ? NAN : cos[idx], s = sin == nullptr ? NAN : sin[idx];
        x.at[i] = rotate(row[element], row[partner], c, s, is_first);
      }
      return x;
    }
  }

 private:
  // Without fused multiply-adds, for the bits to be those of the CPU.
  static __device__ __forceinline__ device_t<T> rotate(device_t<T> x, device_t<T> partner,
                                                       float cos, float sin, bool is_first) {
    const float kept = __fmul_rn(device_to_float(x), cos);
    const float added = __fmul_rn(device_to_float(partner), is_first ? -sin : sin);
    return device_from_float<device_t<T>>(__fadd_rn(kept, added));
  }

  __device__ __forceinline__ Vector rotate_halves(Vector x, int d) const {
    const bool is_first = d < half;
    const int idx = is_first ? d : d - half;
    const Vector partner = Vector::load(row, is_first ? d + half : idx, dim);
    float c[kVector], s[kVector];
    load_table(cos, idx, c);
    load_table(sin, idx, s);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      x.at[i] = rotate(x.at[i], partner.at[i], c[i], s[i], is_first);
    return x;
  }

  __device__ __forceinline__ Vector rotate_pairs(const Vector& x, int d) const {
    float c[kVector / 2], s[kVector / 2];
    load_table(cos, d / 2, c);
    load_table(sin, d / 2, s);
    Vector rotated;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      rotated.at[i] = rotate(x.at[i], x.at[i ^ 1], c[i / 2], s[i / 2], i % 2 == 0);
    }
    return rotated;
  }
};

// What one of kRowLanes lanes does for row `row` of a token: heads of q, then of k, then of v. All
// lanes of a warp call it, also those of rows past the end.
template <class T, class Codec, int kVector>
__device__ __forceinline__ void rope_kv_append_row(const RopeKvAppendParams& params, int64_t token,
                                                   int row, int lane) {
  const KvAppendParams& append = params.append;
  const auto num_heads = static_cast<int>(params.num_heads);
  const auto num_kv_heads = static_cast<int>(append.num_kv_heads);
  const bool is_q = row < num_heads, is_v = row >= num_heads + num_kv_heads;
  const int head = is_q ? row : row - num_heads - (is_v ? num_kv_heads : 0);
  const KvAppendRows& rows = is_v ? append.v : append.k;

  const int64_t position = params.positions[token];
  const bool has_tables = position >= 0 && position < params.max_position;
  const auto dim = static_cast<int>(append.head_dim);
  const char* source =
      is_q ? params.q + token * params.stride_q_token_bytes + head * params.stride_q_head_bytes
           : rows.tokens + token * rows.stride_token_bytes + head * rows.stride_head_bytes;
  const RotaryRow<T, kVector> rotary{
      reinterpret_cast<const device_t<T>*>(source),
      has_tables ? params.cos + position * params.stride_cos : nullptr,
      has_tables ? params.sin + position * params.stride_sin : nullptr,
      dim,
      is_v ? 0 : static_cast<int>(params.half),
      params.interleaved};

  const int64_t slot = append.slot_mapping[token];
  const bool is_kept = !is_q && head < num_kv_heads && slot >= 0 && slot < append.num_slots;
  const int64_t page = is_kept ? slot / append.page_size : 0;
  const KvRowTarget target =
      rows.target(page, is_kept ? slot % append.page_size : 0, is_kept ? head : 0);

  // Rows that stay in the dtype of q.
  if (is_q || (is_kept && std::is_void_v<Codec>)) {
    char* out = is_q ? params.out + (token * num_heads + head) * append.row_bytes : target.row;
    for (int d = lane * kVector; d < dim; d += kRowLanes * kVector) {
      rotary.load(d).store(reinterpret_cast<device_t<T>*>(out), d, dim);
    }
  }
  if constexpr (!std::is_void_v<Codec>) {
    if (__ballot_sync(~0u, is_kept) == 0) return;
    quantize_row<Codec, kVector>(lane, is_kept ? dim : 0, target,
                                 [&](int d) { return rotary.load(d); });
  }
}

}  // namespace effllm
