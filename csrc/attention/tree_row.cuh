// What a packed row of a tree sees of the keys of its sequence's queries, and where they stand.
#pragma once

#include "attention/alibi.cuh"
#include "attention/paged_sequence.cuh"
#include "attention/tree_path.h"

namespace effllm {

// In shared memory, as it is asked for rarely: keys ahead of a tree need none of it. Only where
// args.tree_mask is not null.
struct TreeRow {
  TreePath path, visible;  // `visible`: what the window leaves of the path
  int ahead;               // the key of token 0

  // A TreeRow of shared memory has to be trivial.
  static __device__ __forceinline__ TreeRow of(const PagedAttentionArgs& args,
                                               const Sequence& sequence, int row) {
    const TreePath path = sequence.path(args, args.group_divisor.quotient(row));
    const int ahead = sequence.first_position;
    return {path, path.visible(ahead, args.window, args.sink_tokens), ahead};
  }

  // Of its query, for the row's ALiBi.
  __device__ __forceinline__ int position() const { return ahead + path.depth(); }

  // Of a key up to the query's own, if the row sees it.
  __device__ __forceinline__ int position_of(int key) const { return path.position_of(key, ahead); }

  // Bit k: whether the path lets the row see key first_key + k.
  __device__ __forceinline__ uint32_t sees(int first_key) const {
    return static_cast<uint32_t>(visible.keys_from(first_key, ahead));
  }
};

}  // namespace effllm
