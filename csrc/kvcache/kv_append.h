// kv_append: writes new keys and values into their slots of the paged cache, in place.
//
//   k, v         [T, HKV, D]       any strides with stride(-1) == 1
//   k_cache      [NP, P, HKV, D]   any strides with stride(-1) == 1 (usual memory: [NP, HKV, P, D])
//   v_cache      [NP, P, HKV, D]   likewise
//   slot_mapping [T] int64         token t goes to page slot / P, offset slot % P; -1 skips it
//   k_scale      [NP, P, HKV]      and v_scale: scales of quantised caches; quant/kv_layout.h
//
// Caches of the dtype of k get its bits; those in e4m3, int8 or int4 (then [.., D / 2]) get codes,
// the same on every device to the bit.
//
// Slots are data: the CPU raises on one out of range before it writes anything, the GPU, which
// cannot raise, skips it. Slots must be distinct: of tokens with one slot either may win.
#pragma once

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/view.h"
#include "quant/kv_layout.h"

namespace effllm {

// Where a row of D elements goes; the word is null if the cache is not quantised.
struct KvRowTarget {
  char* row;
  uint32_t* word;
};

// Rows of HKV * D elements on the move.
struct KvAppendRows {
  const char* tokens;  // k or v
  int64_t stride_token_bytes, stride_head_bytes;
  char* cache;
  int64_t stride_page_bytes, stride_slot_bytes, stride_cache_head_bytes;
  KvScales scales;  // of a quantised cache

  constexpr KvRowTarget target(int64_t page, int64_t offset, int64_t head) const {
    char* row = cache + page * stride_page_bytes + offset * stride_slot_bytes +
                head * stride_cache_head_bytes;
    if (scales.words == nullptr) return {row, nullptr};
    return {row, scales.words + page * scales.stride_page + offset * scales.stride_slot +
                     head * scales.stride_head};
  }
};

struct KvAppendParams {
  int64_t num_tokens, num_kv_heads, head_dim;
  int64_t row_bytes;             // of one head of k
  int64_t num_slots, page_size;  // num_slots = NP * P
  DType dtype, cache_dtype;      // of k and v, and of both caches; equal: bits are copied
  KvAppendRows k, v;
  const int64_t* slot_mapping;
  // 16: k and v can be read in words of 16 bytes, and caches written in as many, or in the codes of
  // 8 elements. Else the element size.
  int word_bytes;

  bool quantizes() const { return is_quantized_kv(cache_dtype); }
};

inline KvAppendRows kv_append_rows(const View& tokens, const View& cache, const KvScales& scales) {
  const int64_t token_bytes = element_bytes(tokens.dtype), bytes = element_bytes(cache.dtype);
  return {tokens.data_as<char>(),         tokens.stride(0) * token_bytes,
          tokens.stride(1) * token_bytes, cache.data_as<char>(),
          cache.stride(0) * bytes,        cache.stride(1) * bytes,
          cache.stride(2) * bytes,        scales};
}

// The checks of an op that appends k and v; symbols and `check` are the op's. Without slots.
inline KvAppendParams check_kv_rows(Check& check, const View& k, const View& v, const View& k_cache,
                                    const View& v_cache, const std::optional<View>& k_scale,
                                    const std::optional<View>& v_scale, Sym& tokens, Sym& kv_heads,
                                    Sym& dim) {
  Sym pages("NP"), page_size("P");
  check(k)
      .dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32})
      .shape({tokens, kv_heads, dim})
      .last_stride_one();
  check(v).dtype({k.dtype}).shape({tokens, kv_heads, dim}).last_stride_one();
  check(k_cache).dtype({k.dtype, DType::kFloat8E4M3, DType::kInt8, DType::kUInt8});
  check(v_cache).dtype({k_cache.dtype});
  const KvScales k_scales =
      check_kv_cache(check, k_cache, k_scale, "k_scale", pages, page_size, kv_heads, dim);
  const KvScales v_scales =
      check_kv_cache(check, v_cache, v_scale, "v_scale", pages, page_size, kv_heads, dim);

  KvAppendParams params{};
  params.num_tokens = *tokens;
  params.num_kv_heads = *kv_heads;
  params.head_dim = *dim;
  params.row_bytes = *dim * element_bytes(k.dtype);
  params.num_slots = *pages * *page_size;
  params.page_size = *page_size;
  params.dtype = k.dtype;
  params.cache_dtype = k_cache.dtype;
  params.k = kv_append_rows(k, k_cache, k_scales);
  params.v = kv_append_rows(v, v_cache, v_scales);
  const int64_t bytes = element_bytes(k.dtype), cache_element_bytes = element_bytes(k_cache.dtype);
  const int64_t cache_bytes = !params.quantizes() ? 16 : k_cache.dtype == DType::kUInt8 ? 4 : 8;
  const bool wide = params.row_bytes % 16 == 0 && (!params.quantizes() || *dim % 8 == 0) &&
                    k.has_aligned_rows(16, bytes) && v.has_aligned_rows(16, bytes) &&
                    k_cache.has_aligned_rows(cache_bytes, cache_element_bytes) &&
                    v_cache.has_aligned_rows(cache_bytes, cache_element_bytes);
  params.word_bytes = static_cast<int>(wide ? 16 : element_bytes(k.dtype));
  return params;
}

inline const int64_t* check_slot_mapping(Check& check, const View& slot_mapping, Sym& tokens) {
  check(slot_mapping).dtype({DType::kInt64}).shape({tokens}).last_stride_one();
  return slot_mapping.data_as<int64_t>();
}

inline KvAppendParams check_kv_append(const View& k, const View& v, const View& k_cache,
                                      const View& v_cache, const View& slot_mapping,
                                      const std::optional<View>& k_scale,
                                      const std::optional<View>& v_scale) {
  Check check("kv_append");
  Sym tokens("T"), kv_heads("HKV"), dim("D");
  KvAppendParams params =
      check_kv_rows(check, k, v, k_cache, v_cache, k_scale, v_scale, tokens, kv_heads, dim);
  params.slot_mapping = check_slot_mapping(check, slot_mapping, tokens);
  return params;
}

}  // namespace effllm
