// kv_compact: once a tree of draft tokens is verified, moves the keys and values of the accepted
// path to where its tokens stand in the text, in place; all layers in one call.
//
//   caches        [NP, P, HKV, D] each   any dtypes, any strides with stride(-1) == 1; and scales
//   of
//                                        quantised caches, [NP, P, HKV, 2] or [NP, P, HKV]
//   page_table    [B, MAXP] int32        page of each P positions
//   prefix_lens   [B] int32              position of the root of each tree
//                                        or, for every KV head, [B, HKV, MAXP] and [B, HKV]
//   accept_index  [B, W] int32           of tree_verify: numbers of nodes, ascending
//   num_accepted  [B] int32              how many of them count
//
// Node i of tree b lies at position prefix_lens[b] + i. For each i < num_accepted[b], in order, the
// rows of node accept_index[b, i] go to position prefix_lens[b] + i; bits are moved as they are. As
// numbers ascend, no place is written that is read later. What comes after the path keeps its bits.
//
// Paths, lengths and tables are data: the CPU raises on one out of range before it writes anything;
// the GPU, which cannot raise, leaves out moves from or to a place that is none, and what it leaves
// where numbers do not ascend is undefined. So it is where caches share memory, or trees places.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/view.h"
#include "kvcache/cache_groups.h"

namespace effllm {

// Where the row of one head of one token lies.
struct RowLayout {
  int64_t stride_page_bytes, stride_slot_bytes, stride_head_bytes, row_bytes;

  bool operator==(const RowLayout&) const = default;
};

struct KvCompactCache {
  char* data;
  RowLayout layout;

  int word_bytes() const {
    return widest_word_bytes(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) |
                             layout.stride_page_bytes | layout.stride_slot_bytes |
                             layout.stride_head_bytes | layout.row_bytes);
  }
};

// The paths of all trees, and where their nodes lie.
struct KvCompactPaths {
  int64_t num_trees, num_kv_heads, num_pages, page_size, max_pages_per_seq, max_nodes;  // W
  const int32_t* page_table;
  int64_t stride_page_table_seq, stride_page_table_head;  // 0: all heads have the same
  const int32_t* prefix_lens;
  int64_t stride_prefix_lens_seq, stride_prefix_lens_head;  // likewise
  const int32_t* accept_index;
  int64_t stride_accept_index;
  const int32_t* num_accepted;

  // In bytes from the start of a cache; -1 if the node lies outside the table or the pages.
  constexpr int64_t row_offset(const RowLayout& layout, int64_t tree, int64_t head,
                               int32_t node) const {
    const int32_t prefix =
        prefix_lens[tree * stride_prefix_lens_seq + head * stride_prefix_lens_head];
    if (prefix < 0 || node < 0) return -1;
    // Of 32 bits, in which a GPU divides several times as fast.
    const uint32_t position = static_cast<uint32_t>(prefix) + static_cast<uint32_t>(node);
    const uint32_t entry = position / static_cast<uint32_t>(page_size);
    if (entry >= max_pages_per_seq) return -1;
    const int64_t page =
        page_table[tree * stride_page_table_seq + head * stride_page_table_head + entry];
    if (page < 0 || page >= num_pages) return -1;
    return page * layout.stride_page_bytes +
           position % static_cast<uint32_t>(page_size) * layout.stride_slot_bytes +
           head * layout.stride_head_bytes;
  }
};

struct KvCompactParams {
  KvCompactPaths paths;
  std::vector<KvCompactCache> caches;  // those without bytes left out
};

// `element_bytes`: of each cache, whatever its dtype.
inline KvCompactParams check_kv_compact(const std::vector<View>& caches,
                                        const std::vector<int64_t>& element_bytes,
                                        const View& page_table, const View& prefix_lens,
                                        const View& accept_index, const View& num_accepted) {
  Check check("kv_compact");
  Sym trees("B"), max_pages("MAXP"), nodes("W"), pages("NP"), page_size("P"), kv_heads("HKV");
  const bool per_head = page_table.rank == 3;
  check(page_table).dtype({DType::kInt32});
  check(prefix_lens).dtype({DType::kInt32});
  if (per_head) {
    check(page_table).shape({trees, kv_heads, max_pages}).last_stride_one();
    check(prefix_lens).shape({trees, kv_heads}).last_stride_one();
  } else {
    check(page_table).shape({trees, max_pages}).last_stride_one();
    check(prefix_lens).shape({trees}).last_stride_one();
  }
  check(accept_index).dtype({DType::kInt32}).shape({trees, nodes}).last_stride_one();
  check(num_accepted).dtype({DType::kInt32}).shape({trees}).last_stride_one();

  KvCompactParams params{};
  for (size_t idx = 0; idx < caches.size(); ++idx) {
    const View& cache = caches[idx];
    int64_t row_bytes = element_bytes[idx];
    if (cache.rank == 3) {
      check(cache).shape({pages, page_size, kv_heads});
    } else {
      Sym dim("D");
      check(cache).shape({pages, page_size, kv_heads, dim}).last_stride_one();
      row_bytes *= *dim;
    }
    check.that(*page_size >= 1 && *page_size <= INT32_MAX,
               std::string(cache.name) + " must have a page size of 1 to 2^31 - 1, got " +
                   std::to_string(*page_size));
    if (cache.numel() == 0) continue;
    const int64_t bytes = element_bytes[idx];
    params.caches.push_back(
        {cache.data_as<char>(),
         {cache.stride(0) * bytes, cache.stride(1) * bytes, cache.stride(2) * bytes, row_bytes}});
  }
  if (params.caches.empty()) return params;

  KvCompactPaths& paths = params.paths;
  paths.num_trees = *trees;
  paths.num_kv_heads = *kv_heads;
  paths.num_pages = *pages;
  paths.page_size = *page_size;
  paths.max_pages_per_seq = *max_pages;
  paths.max_nodes = *nodes;
  paths.page_table = page_table.data_as<int32_t>();
  paths.stride_page_table_seq = page_table.stride(0);
  paths.stride_page_table_head = per_head ? page_table.stride(1) : 0;
  paths.prefix_lens = prefix_lens.data_as<int32_t>();
  paths.stride_prefix_lens_seq = prefix_lens.stride(0);
  paths.stride_prefix_lens_head = per_head ? 1 : 0;
  paths.accept_index = accept_index.data_as<int32_t>();
  paths.stride_accept_index = accept_index.stride(0);
  paths.num_accepted = num_accepted.data_as<int32_t>();
  return params;
}

}  // namespace effllm
