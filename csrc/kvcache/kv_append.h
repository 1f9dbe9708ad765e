// kv_append: writes new keys and values into their slots of the paged cache, in place.
//
//   k, v         [T, HKV, D]       any strides with stride(-1) == 1, of the caches' dtype
//   k_cache      [NP, P, HKV, D]   any strides with stride(-1) == 1 (usual memory: [NP, HKV, P, D])
//   v_cache      [NP, P, HKV, D]   likewise
//   slot_mapping [T] int64         token t goes to page slot / P, offset slot % P; -1 skips it
//
// Slots are data: the CPU raises on one out of range before it writes anything, the GPU, which
// cannot raise, skips it. Slots must be distinct: of tokens with one slot either may win.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/view.h"

namespace effllm {

// Rows of HKV * D elements on the move; what an element means does not matter here.
struct KvAppendRows {
  const char* tokens;  // k or v
  int64_t stride_token_bytes, stride_head_bytes;
  char* cache;
  int64_t stride_page_bytes, stride_slot_bytes, stride_cache_head_bytes;
};

struct KvAppendParams {
  int64_t num_tokens, num_kv_heads, row_bytes;  // one row: the D elements of one head
  int64_t num_slots, page_size;                 // num_slots = NP * P
  KvAppendRows k, v;
  const int64_t* slot_mapping;
  // Bytes that every address and size above is a multiple of: 16, or else the element size.
  int word_bytes;
};

inline KvAppendRows kv_append_rows(const View& tokens, const View& cache, int64_t element_bytes) {
  return {tokens.data_as<char>(),           tokens.stride(0) * element_bytes,
          tokens.stride(1) * element_bytes, cache.data_as<char>(),
          cache.stride(0) * element_bytes,  cache.stride(1) * element_bytes,
          cache.stride(2) * element_bytes};
}

inline bool is_aligned(const KvAppendRows& rows, int64_t bytes) {
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.tokens)) |
                      static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.cache)) |
                      rows.stride_token_bytes | rows.stride_head_bytes | rows.stride_page_bytes |
                      rows.stride_slot_bytes | rows.stride_cache_head_bytes;
  return all % bytes == 0;
}

inline KvAppendParams check_kv_append(const View& k, const View& v, const View& k_cache,
                                      const View& v_cache, const View& slot_mapping) {
  Check check("kv_append");
  Sym tokens("T"), kv_heads("HKV"), dim("D"), pages("NP"), page_size("P");
  check(k)
      .dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32})
      .shape({tokens, kv_heads, dim})
      .last_stride_one();
  check(v).dtype({k.dtype}).shape({tokens, kv_heads, dim}).last_stride_one();
  check(k_cache).dtype({k.dtype}).shape({pages, page_size, kv_heads, dim}).last_stride_one();
  check(v_cache).dtype({k.dtype}).shape({pages, page_size, kv_heads, dim}).last_stride_one();
  check(slot_mapping).dtype({DType::kInt64}).shape({tokens}).last_stride_one();

  const int64_t element_bytes = k.dtype == DType::kFloat32 ? 4 : 2;
  KvAppendParams params{};
  params.num_tokens = *tokens;
  params.num_kv_heads = *kv_heads;
  params.row_bytes = *dim * element_bytes;
  params.num_slots = *pages * *page_size;
  params.page_size = *page_size;
  params.k = kv_append_rows(k, k_cache, element_bytes);
  params.v = kv_append_rows(v, v_cache, element_bytes);
  params.slot_mapping = slot_mapping.data_as<int64_t>();
  const bool wide =
      params.row_bytes % 16 == 0 && is_aligned(params.k, 16) && is_aligned(params.v, 16);
  params.word_bytes = static_cast<int>(wide ? 16 : element_bytes);
  return params;
}

}  // namespace effllm
