// What a packed row of a tree sees of the keys of its sequence's queries, and where they stand.
#pragma once

#include "attention/alibi.cuh"
#include "attention/paged_sequence.cuh"
#include "attention/tree_path.h"

namespace effllm {

// In shared memory, as it is asked for rarely: keys ahead of a tree need none of it. Only where
// args.tree_mask is not null.
struct TreeRow {
  TreePath path;
  int ahead;               // the key of token 0
  uint32_t seen_words[4];  // keys ahead, what the window leaves of the path, keys behind the tree

  // A TreeRow of shared memory has to be trivial.
  static __device__ __forceinline__ TreeRow of(const PagedAttentionArgs& args,
                                               const Sequence& sequence, int row) {
    const TreePath path = sequence.path(args, args.group_divisor.quotient(row));
    const int ahead = sequence.first_position;
    const uint64_t seen = path.visible(ahead, args.window, args.sink_tokens).tokens;
    return {path, ahead, {~0u, static_cast<uint32_t>(seen), static_cast<uint32_t>(seen >> 32), 0}};
  }

  // Of its query, for the row's ALiBi.
  __device__ __forceinline__ int position() const { return ahead + path.depth(); }

  // Of a key up to the query's own, if the row sees it.
  __device__ __forceinline__ int position_of(int key) const { return path.position_of(key, ahead); }

  // Bit k: whether the path lets the row see key first_key + k. In 32 bits: registers are short.
  __device__ __forceinline__ uint32_t sees(int first_key) const {
    const int token = min(max(first_key - ahead, -32), 63);
    const uint32_t* words = seen_words + (token + 32) / 32;
    return __funnelshift_r(words[0], words[1], token);
  }
};

}  // namespace effllm
