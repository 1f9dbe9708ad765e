// rope_kv_append: rotary position embedding of q and k, and k and v into their slots of the cache.
//
//   q            [T, HQ, D]        any strides with stride(-1) == 1
//   cos, sin     [MAXPOS, R/2] f32 any strides with stride(-1) == 1; R <= D
//   positions    [T] int64         row of cos and sin for each token
//   k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale: as in kv_append.h
//   out          [T, HQ, D]        q rotated, contiguous
//
// The first R elements of a head rotate in pairs: i and i + R/2 or, interleaved, 2i and 2i + 1. a
// and b become
//
//   a * cos[p, i] - b * sin[p, i]      and      b * cos[p, i] + a * sin[p, i]
//
// in fp32, each product and the sum rounded by itself, then once to the dtype of q. So the bits are
// the same on every device and as in PyTorch, and k is quantised as kv_append would what PyTorch
// had rotated. The other D - R elements keep their bits.
//
// Positions are data, as slots are: the CPU raises on one out of range, also of a token without a
// slot, before it writes anything. The GPU, which cannot raise, reads no table there: what should
// have been rotated is NaN.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/view.h"
#include "kvcache/kv_append.h"

namespace effllm {

struct RopeKvAppendParams {
  KvAppendParams append;
  int64_t num_heads;  // of q
  const char* q;
  int64_t stride_q_token_bytes, stride_q_head_bytes;
  char* out;
  const float *cos, *sin;
  int64_t stride_cos, stride_sin;  // of positions
  int64_t max_position, half;      // half = R / 2
  const int64_t* positions;
  bool interleaved;
  // Rows can be moved, and pairs found, in vectors of 8 elements, tables read 16 bytes at a time.
  bool wide;
};

inline RopeKvAppendParams check_rope_kv_append(
    const View& q, const View& k, const View& v, const View& cos, const View& sin,
    const View& positions, const View& k_cache, const View& v_cache, const View& slot_mapping,
    const std::optional<View>& k_scale, const std::optional<View>& v_scale, bool interleaved) {
  Check check("rope_kv_append");
  Sym tokens("T"), heads("HQ"), kv_heads("HKV"), dim("D"), max_position("MAXPOS"), half("R/2");
  check(q)
      .dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32})
      .shape({tokens, heads, dim})
      .last_stride_one();
  check(k).dtype({q.dtype});
  RopeKvAppendParams params{};
  params.append =
      check_kv_rows(check, k, v, k_cache, v_cache, k_scale, v_scale, tokens, kv_heads, dim);
  params.append.slot_mapping = check_slot_mapping(check, slot_mapping, tokens);
  check(cos).dtype({DType::kFloat32}).shape({max_position, half}).last_stride_one();
  check(sin).dtype({DType::kFloat32}).shape({max_position, half}).last_stride_one();
  check.that(*half <= *dim / 2,
             "cos and sin must have at most D / 2 = " + std::to_string(*dim / 2) +
                 " columns, got " + std::to_string(*half));
  check(positions).dtype({DType::kInt64}).shape({tokens}).last_stride_one();

  const int64_t bytes = element_bytes(q.dtype);
  params.num_heads = *heads;
  params.q = q.data_as<char>();
  params.stride_q_token_bytes = q.stride(0) * bytes;
  params.stride_q_head_bytes = q.stride(1) * bytes;
  params.cos = cos.data_as<float>();
  params.sin = sin.data_as<float>();
  params.stride_cos = cos.stride(0);
  params.stride_sin = sin.stride(0);
  params.max_position = *max_position;
  params.half = *half;
  params.positions = positions.data_as<int64_t>();
  params.interleaved = interleaved;
  params.wide = params.append.word_bytes == 16 && *dim % 8 == 0 &&
                *half % (interleaved ? 4 : 8) == 0 && q.has_aligned_rows(16, bytes) &&
                cos.has_aligned_rows(16, sizeof(float)) && sin.has_aligned_rows(16, sizeof(float));
  return params;
}

}  // namespace effllm
