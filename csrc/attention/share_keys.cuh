// What kernels that split keys need besides their problem: how many CTAs, or clusters of them,
// share the keys, and memory for what these leave for one another.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>

#include "attention/combine.cuh"
#include "attention/paged_kv.h"
#include "common/math.h"
#include "cuda/launch.h"
#include "quant/kv_layout.h"

namespace effllm {

// Where the op runs, and memory for so many floats there that lives until the op has returned: the
// allocator keeps the stream's order.
struct AttentionContext {
  int device;
  cudaStream_t stream;
  std::function<float*(int64_t)> allocate;

  int attribute(cudaDeviceAttr attribute) const {
    return device_attribute(attribute, device, "paged_attention");
  }
};

// The most keys that a query sees, if they are as many as the page table has room for: lengths are
// known on the device alone.
inline int64_t max_keys(const PagedAttentionArgs& args) {
  return std::min(args.max_pages_per_seq * args.page_size,
                  args.sink_tokens + args.window + args.max_seqlen_q);
}

// What an H100 takes to load them and their values, of all pairs, in us.
inline double key_us(const PagedAttentionArgs& args) {
  constexpr double kBytesPerUs = 2.98e6;
  // Packed, two 4-bit codes are a byte.
  const double element_bytes =
      is_quantized_kv(args.kv_dtype) ? (args.kv_dtype == DType::kUInt8 ? 0.5 : 1) : 2;
  const double rows = static_cast<double>(args.num_seqs * args.num_kv_heads * max_keys(args)) * 2;
  return rows * static_cast<double>(args.head_dim) * element_bytes / kBytesPerUs;
}

// Tiles that cover the rows of a pair.
template <class Config>
int64_t count_row_tiles(const PagedAttentionArgs& args) {
  const int64_t max_rows = std::min<int64_t>(args.group * args.max_seqlen_q, args.max_rows);
  return ceil_div<int64_t>(max_rows, Config::kRows);
}

// How many share the keys, of `owners` (CTAs or clusters of them) that run together, and memory for
// what they leave.
template <class Config>
void share_keys(PagedAttentionArgs& args, const AttentionContext& context, int64_t owners) {
  args.early_start = context.attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  args.num_row_tiles = static_cast<int32_t>(count_row_tiles<Config>(args));
  // As many as run together, or as parts that are worth one.
  const int64_t resident = std::clamp<int64_t>(owners / args.num_row_tiles, 1, kMaxShares);
  const int64_t pairs = args.num_seqs * args.num_kv_heads;
  const int64_t table_keys = args.max_pages_per_seq * args.page_size;
  if (args.sink_tokens > 0 && args.split_size == 0) {
    // Pieces of no promised size, as no part may reach over the gap: for each CTA about one.
    const int64_t even = ceil_div(max_keys(args) * pairs, resident);
    args.split_size = ceil_div(std::max<int64_t>(even, Config::kUnsplitBlocks * Config::kBlockKeys),
                               kSplitSizeStep) *
                      kSplitSizeStep;
    args.split_size_divisor = FastDivisor::of(args.split_size);
  }
  const bool fixed = args.split_size > 0;
  const int64_t part_keys = fixed ? args.split_size : Config::kMinBlocks * Config::kBlockKeys;
  int64_t parts_per_pair = std::max<int64_t>(ceil_div(max_keys(args), part_keys), 1);
  if (fixed) {
    // The head and what is behind it end and begin anywhere in a piece.
    const int64_t cuts = args.sink_tokens > 0 ? 2 : 1;
    const int64_t of_table = std::max<int64_t>(ceil_div(table_keys, part_keys), 1);
    parts_per_pair = std::min(parts_per_pair + cuts, of_table + cuts - 1);
    if (parts_per_pair > kMaxShares) {
      fail("paged_attention", "split_size must make at most " + std::to_string(kMaxShares) +
                                  " pieces of MAXP * P = " + std::to_string(table_keys) +
                                  " keys, got " + std::to_string(args.split_size));
    }
  } else {
    parts_per_pair = std::min(parts_per_pair, resident);
  }
  const int64_t parts = pairs * parts_per_pair;
  args.num_shares = static_cast<int32_t>(std::min(parts, resident));

  const int64_t slots = (fixed ? parts : args.num_shares) * args.num_row_tiles;
  const int64_t rows = slots * (fixed ? 1 : 2) * Config::kRows;
  args.partial_out = context.allocate(rows * (args.head_dim + 2) + slots * Config::kMaxCluster * 2);
  args.partial_softmax = args.partial_out + rows * args.head_dim;
  args.arrivals = reinterpret_cast<uint64_t*>(args.partial_softmax + rows * 2);
}

}  // namespace effllm
