// Which queries and keys a CTA works on, from the lengths in device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/paged_kv.h"
#include "attention/tree_path.h"

namespace effllm {

// Half-open range of keys.
struct KeyRange {
  int begin, end;

  __device__ __forceinline__ bool contains(int key) const { return key >= begin && key < end; }
  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

// How lengths are read. What has been read past L1 is not found there by those who read it later,
// when it may have changed.
struct LoadCached {
  static constexpr bool kOneQuery = false;
  __device__ __forceinline__ int32_t operator()(const int32_t* src) const { return *src; }
};
struct LoadPastL1 {
  static constexpr bool kOneQuery = false;
  __device__ __forceinline__ int32_t operator()(const int32_t* src) const { return __ldcg(src); }
};

// Where each sequence has one query, cu_seqlens_q need not be there.
template <class Load>
struct LoadOfOneQuery : Load {
  static constexpr bool kOneQuery = true;
};

// As they stand in memory.
struct SequenceLengths {
  int start, next, keys;

  template <class Load>
  __device__ __forceinline__ SequenceLengths(const PagedAttentionArgs& args, int seq_idx,
                                             int table_head, Load load) {
    // Asked for together, before any is waited for; and in 32 bits, which is half the work.
    if constexpr (Load::kOneQuery) {
      start = seq_idx, next = seq_idx + 1;
    } else {
      start = load(args.cu_seqlens_q + seq_idx);
      next = load(args.cu_seqlens_q + seq_idx + 1);
    }
    keys = load(args.seq_lens + seq_idx * args.stride_seq_lens_seq + table_head);
  }
};

// All keys that some query of a sequence sees: those of the head, which stay visible when the
// window has left them behind, and the others.
struct SeenKeys {
  int head_end;  // from 0 on
  KeyRange keys;

  __device__ __forceinline__ bool empty() const { return head_end == 0 && keys.empty(); }
};

// A sequence as the KV heads of one page table see it: all of them, or each on its own.
struct Sequence {
  int seq_idx;
  int first_kv_head;    // of the table
  int64_t first_token;  // row of q and out that holds query 0
  int64_t end_token;    // where the next sequence begins
  int num_queries;      // at most max_seqlen_q: the grid covers no more
  int num_keys;
  int first_position;  // of query 0; negative if there are fewer keys than queries
  const int32_t* page_row;

  // Lengths that contradict the tensors' sizes are clamped to them.
  template <class Load = LoadCached>
  __device__ __forceinline__ Sequence(const PagedAttentionArgs& args, int table_idx,
                                      Load load = {}) {
    seq_idx = static_cast<int>(args.table_heads_divisor.quotient(table_idx));
    const int table_head = table_idx - seq_idx * static_cast<int>(args.table_heads);
    first_kv_head = table_head * args.heads_per_table;
    const SequenceLengths lengths(args, seq_idx, table_head, load);
    const int start = lengths.start, next = lengths.next, keys = lengths.keys;
    const auto clamp = [](int value, int low, int64_t high) {
      const int limit = high < INT32_MAX ? static_cast<int>(high) : INT32_MAX;
      return value < low ? low : value > limit ? limit : value;
    };
    int first = start, end = next;
    num_queries = 1;
    if constexpr (!Load::kOneQuery) {
      first = clamp(start, 0, args.num_tokens);
      end = clamp(next, first, args.num_tokens);
      num_queries = clamp(end - first, 0, args.max_seqlen_q);
    }
    first_token = first;
    end_token = end;
    num_keys = clamp(keys, 0, args.max_pages_per_seq * args.page_size);
    first_position = num_keys - (end - first);
    page_row = args.page_table + seq_idx * args.stride_page_table_seq +
               table_head * args.stride_page_table_head;
  }

  // The keys that a query sees behind the head: always one range. Of the head it sees what lies
  // before the end of that.
  __device__ __forceinline__ KeyRange visible_keys(const PagedAttentionArgs& args,
                                                   int query_idx) const {
    return keys_up_to(args, query_idx, first_position + query_idx);
  }

  // In a tree: the range that holds all keys of its path, and of those ahead of it what it sees.
  __device__ __forceinline__ KeyRange keys_of_path(const PagedAttentionArgs& args,
                                                   int query_idx) const {
    const auto depth = min(int64_t{path(args, query_idx).depth()}, args.window - 1);
    return keys_up_to(args, query_idx, first_position + static_cast<int>(depth));
  }

  // What a query would see that stands at `position` of its text.
  __device__ __forceinline__ KeyRange keys_up_to(const PagedAttentionArgs& args, int query_idx,
                                                 int position) const {
    const int slot = first_position + query_idx;
    int end = num_keys;
    if (args.causal && slot + 1 < end) end = slot + 1 > 0 ? slot + 1 : 0;
    // A window of INT32_MAX and more is none.
    int begin = position >= args.window ? position - static_cast<int>(args.window) + 1 : 0;
    if (begin < args.sink_tokens) begin = args.sink_tokens;
    return {begin > end ? end : begin, end};
  }

  __device__ __forceinline__ TreePath path(const PagedAttentionArgs& args, int query_idx) const {
    return TreePath::of(args.tree_mask[first_token + query_idx], query_idx);
  }

  // All keys behind the head that queries first_query .. last_query see between them. The first may
  // stand within it.
  __device__ __forceinline__ KeyRange visible_keys(const PagedAttentionArgs& args, int first_query,
                                                   int last_query) const {
    const int begin = visible_keys(args, first_query).begin;
    const int end = visible_keys(args, last_query).end;
    const int head_end = end < args.sink_tokens ? end : args.sink_tokens;
    return {begin < head_end ? head_end : begin, end};
  }

  // With a split_size the keys behind the head begin at a multiple of it. No branch, which would
  // put off the loads of what lies behind it.
  __device__ __forceinline__ SeenKeys seen_keys(const PagedAttentionArgs& args) const {
    const KeyRange keys = visible_keys(args, 0, num_queries > 0 ? num_queries - 1 : 0);
    const FastDivisor& split = args.split_size_divisor;
    const auto piece_begin = static_cast<int>(split.quotient(keys.begin) * split.divisor);
    const int begin = keys.empty() ? keys.begin : piece_begin;
    const int head_end = keys.end < args.sink_tokens ? keys.end : args.sink_tokens;
    return {num_queries > 0 ? head_end : 0, {begin, num_queries > 0 ? keys.end : begin}};
  }

  // Whether this launch takes care of the sequence, or another.
  __device__ __forceinline__ bool is_taken(const PagedAttentionArgs& args) const {
    const int num_rows = num_queries * args.group;
    return num_rows >= args.min_rows && num_rows <= args.max_rows;
  }
};

// Where the result of a packed row goes.
struct OutputRow {
  int head;
  int64_t idx;  // in [T * HQ]: of lse, and of out by D

  __device__ __forceinline__ OutputRow(const PagedAttentionArgs& args, const Sequence& sequence,
                                       int kv_head, int row) {
    const int query_idx = static_cast<int>(args.group_divisor.quotient(row));
    head = kv_head * args.group + row - query_idx * args.group;
    idx = (sequence.first_token + query_idx) * args.num_q_heads + head;
  }
};

// Writes out = 0 and lse = -inf for the tokens [begin, end) and the query heads of `kv_head`.
template <class T>
__device__ __forceinline__ void clear_tokens(const PagedAttentionArgs& args, int64_t begin,
                                             int64_t end, int kv_head) {
  const int chunks = static_cast<int>(args.head_dim) / 8;
  const int64_t chunks_per_token = int64_t{chunks} * args.group;
  for (int64_t i = threadIdx.x; i < (end - begin) * chunks_per_token; i += blockDim.x) {
    const int64_t token = begin + i / chunks_per_token;
    const int within_token = static_cast<int>(i % chunks_per_token);
    const int64_t row = token * args.num_q_heads + kv_head * args.group + within_token / chunks;
    const int chunk = within_token % chunks;
    reinterpret_cast<uint4*>(static_cast<T*>(args.out) + row * args.head_dim)[chunk] = {};
    if (chunk == 0) args.lse[row] = -INFINITY;
  }
}

// Clears the tokens that no CTA computes and that this sequence is nearest to: those before the
// first sequence, those past the last, and those over max_seqlen_q. Padding of a CUDA graph's batch
// lies there, and must be 0, not NaN. One CTA per (sequence, KV head) calls it.
template <class T>
__device__ __forceinline__ void clear_unowned_tokens(const PagedAttentionArgs& args,
                                                     const Sequence& sequence, int kv_head) {
  if (sequence.seq_idx == 0) clear_tokens<T>(args, 0, sequence.first_token, kv_head);
  const bool last = sequence.seq_idx == args.num_seqs - 1;
  clear_tokens<T>(args, sequence.first_token + sequence.num_queries,
                  last ? args.num_tokens : sequence.end_token, kv_head);
}

}  // namespace effllm
