// What the CPU's paged_attention computes piece by piece: which rows with which keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/paged_attention.h"
#include "common/check.h"

namespace effllm {

inline constexpr int64_t kTileRows = 32;
inline constexpr int64_t kSplitKeys = 512;

struct KeyRange {
  int64_t begin, end;

  KeyRange operator&(const KeyRange& other) const {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
  bool operator==(const KeyRange&) const = default;
  bool empty() const { return begin >= end; }
};

// As the KV heads of one page table see it: all of them, or each on its own.
struct Sequence {
  int64_t first_token, num_queries, num_keys;
  const int32_t* pages;
  const int64_t* tree_mask;  // the words of its queries, or null

  // Keys before those of the queries; negative if there are fewer keys than queries.
  int64_t ahead() const { return num_keys - num_queries; }

  // The first position of a tree's own keys.
  int64_t base() const { return std::max<int64_t>(ahead(), 0); }

  // Without tokens that have no key, should there be fewer keys than queries.
  TreePath path(int64_t query) const {
    const int64_t missing = base() - ahead();
    const uint64_t there = missing < kMaxTreeTokens ? ~uint64_t{0} << missing : 0;
    return {TreePath::of(tree_mask[query], static_cast<int>(query)).tokens & there};
  }

  // In the text that ends with the query; of a tree, where its path follows the keys ahead.
  int64_t position(int64_t query) const {
    return tree_mask != nullptr ? base() + path(query).depth() : ahead() + query;
  }

  // How far behind its position in that text a key lies in the cache.
  int64_t shift(int64_t query, int64_t position) const {
    const int64_t depth = position - base();
    return depth < 0 ? 0 : ahead() + path(query).token_at(static_cast<int>(depth)) - position;
  }

  // What query `query` of this sequence sees behind the head, as positions.
  KeyRange visible_keys(const PagedAttentionParams& params, int64_t query) const {
    return {std::max<int64_t>(position(query) - params.window + 1, params.sink_tokens),
            end(params, query)};
  }

  // At least what queries `first` to `last` see: both ends grow with the query, but that in a tree
  // any of them may stand as early as its root, and none later than if all were one path.
  KeyRange visible_keys(const PagedAttentionParams& params, int64_t first, int64_t last) const {
    if (tree_mask != nullptr) {
      return {visible_keys(params, 0).begin, std::min(ahead() + last + 1, num_keys)};
    }
    return {visible_keys(params, first).begin, visible_keys(params, last).end};
  }

  // The first keys, which it sees whatever its window; and at least those of some queries.
  KeyRange head_keys(const PagedAttentionParams& params, int64_t query) const {
    return {0, std::min<int64_t>(params.sink_tokens, end(params, query))};
  }
  KeyRange head_keys(const PagedAttentionParams& params, int64_t first, int64_t last) const {
    return {0, std::min<int64_t>(params.sink_tokens, visible_keys(params, first, last).end)};
  }

 private:
  int64_t end(const PagedAttentionParams& params, int64_t query) const {
    return params.causal ? std::min(position(query) + 1, num_keys) : num_keys;
  }
};

inline Sequence sequence_at(const PagedAttentionParams& params, int64_t index, int64_t kv_head) {
  const int32_t* starts = params.cu_seqlens_q + index;
  const int64_t head = params.table_heads > 1 ? kv_head : 0;
  return {starts[0], starts[1] - starts[0],
          params.seq_lens[index * params.stride_seq_lens_seq + head],
          params.page_table + index * params.stride_page_table_seq +
              head * params.stride_page_table_head,
          params.tree_mask != nullptr ? params.tree_mask + starts[0] : nullptr};
}

// Checks what the tensors hold, as far as it will be read. Nothing may throw once threads run.
inline void check_values(const char* op, const PagedAttentionParams& params) {
  const Check check(op);
  const auto in_range = [&](const std::string& name, int64_t value, int64_t first, int64_t last,
                            const char* formula) {
    if (value >= first && value <= last) return;
    const int64_t bounds[] = {first, last};
    check.that(false, name + " must be in " + formula + " = " + format_list(bounds, 2) + ", got " +
                          std::to_string(value));
  };

  check.that(params.cu_seqlens_q[0] == 0,
             "cu_seqlens_q[0] must be 0, got " + std::to_string(params.cu_seqlens_q[0]));
  const int64_t longest_keys = params.max_pages_per_seq * params.page_size;
  int64_t longest_query = 0;
  for (int64_t table = 0; table < params.num_seqs * params.table_heads; ++table) {
    const int64_t idx = table / params.table_heads, head = table % params.table_heads;
    const std::string position =
        std::to_string(idx) + (params.table_heads > 1 ? ", " + std::to_string(head) : "");
    const Sequence seq = sequence_at(params, idx, head);
    in_range("cu_seqlens_q[" + std::to_string(idx + 1) + "]", params.cu_seqlens_q[idx + 1],
             params.cu_seqlens_q[idx], params.num_tokens, "[the entry before it, T]");
    in_range("seq_lens[" + position + "]", seq.num_keys, 0, longest_keys, "[0, MAXP * P]");
    longest_query = std::max(longest_query, seq.num_queries);

    if (seq.num_queries == 0) continue;
    const int64_t last = seq.num_queries - 1;
    for (const KeyRange keys :
         {seq.head_keys(params, 0, last), seq.visible_keys(params, 0, last)}) {
      if (keys.empty()) continue;
      for (int64_t page = keys.begin / params.page_size; page * params.page_size < keys.end;
           ++page) {
        if (seq.pages[page] >= 0 && seq.pages[page] < params.num_pages) continue;
        in_range("page_table[" + position + ", " + std::to_string(page) + "]", seq.pages[page], 0,
                 params.num_pages - 1, "[0, NP - 1]");
      }
    }
  }
  check.that(params.max_seqlen_q >= longest_query,
             "max_seqlen_q must be at least the longest query of cu_seqlens_q, " +
                 std::to_string(longest_query) + ", got " + std::to_string(params.max_seqlen_q));
}

// Up to kTileRows rows of one sequence and KV head, and the keys that any of them sees. Row r is
// query token r / group of the sequence and query head r % group of the KV head.
struct Task {
  Sequence seq;
  int64_t kv_head, first_row, num_rows;
  KeyRange head, keys;

  // Which query of the sequence row `row` of the task is of.
  int64_t query(const PagedAttentionParams& params, int64_t row) const {
    return (first_row + row) / (params.num_q_heads / params.num_kv_heads);
  }

  // At least one, so that a task without keys has its rows stored too.
  int64_t num_splits() const {
    return std::max<int64_t>(num_head_splits() + splits_up_to(keys.end) - first_split(), 1);
  }
  KeyRange split(int64_t idx) const {
    const bool in_head = idx < num_head_splits();
    const int64_t begin = (in_head ? idx : idx - num_head_splits() + first_split()) * kSplitKeys;
    return (in_head ? head : keys) & KeyRange{begin, begin + kSplitKeys};
  }

 private:
  static int64_t splits_up_to(int64_t end) { return (end + kSplitKeys - 1) / kSplitKeys; }
  int64_t num_head_splits() const { return head.empty() ? 0 : splits_up_to(head.end); }
  // Of the keys behind the head; the last one's successor if there are none.
  int64_t first_split() const {
    return keys.empty() ? splits_up_to(keys.end) : keys.begin / kSplitKeys;
  }
};

inline std::vector<Task> make_tasks(const PagedAttentionParams& params) {
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  std::vector<Task> tasks;
  for (int64_t idx = 0; idx < params.num_seqs; ++idx) {
    const int64_t total_rows = sequence_at(params, idx, 0).num_queries * group;
    for (int64_t row = 0; row < total_rows; row += kTileRows) {
      const int64_t num_rows = std::min(kTileRows, total_rows - row);
      for (int64_t head = 0; head < params.num_kv_heads; ++head) {
        const Sequence seq = sequence_at(params, idx, head);
        const int64_t last = (row + num_rows - 1) / group;
        tasks.push_back({seq, head, row, num_rows, seq.head_keys(params, row / group, last),
                         seq.visible_keys(params, row / group, last)});
      }
    }
  }
  return tasks;
}

}  // namespace effllm
