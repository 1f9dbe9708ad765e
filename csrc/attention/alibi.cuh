// Attention with linear biases (ALiBi, arXiv:2108.12409): a score loses a slope for each position
// between its query and its key.
#pragma once

#include "attention/online_softmax.cuh"
#include "attention/paged_sequence.cuh"

namespace effllm {

// Of one packed row of a (sequence, KV head) pair. Only where args.alibi_slopes is not null.
struct AlibiRow {
  float slope;
  int position;  // of the query

  // An AlibiRow of shared memory has to be trivial.
  static __device__ __forceinline__ AlibiRow of(const PagedAttentionArgs& args,
                                                const Sequence& sequence, int kv_head, int row) {
    const int query_idx = static_cast<int>(args.group_divisor.quotient(row));
    const int head = kv_head * args.group + row - query_idx * args.group;
    return {args.alibi_slopes[head], sequence.first_position + query_idx};
  }

  // `x` is a score in base 2, `key` the position of its key. The product is not folded into the
  // slope: a large slope would become infinite there, and NaN with a distance of 0.
  __device__ __forceinline__ float biased(float x, int key) const {
    return fmaf(-kLog2E, slope * static_cast<float>(abs(position - key)), x);
  }
};

}  // namespace effllm
