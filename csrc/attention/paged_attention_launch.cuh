// Which kernel paged_attention takes, for caches of one dtype. Few rows per KV head go to the
// decode kernel, some more, and trees, to the extend kernel (both bytes-bound, keys split over
// CTAs), many to the prefill kernel (arithmetic-bound, rows split over CTAs).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>

#include "attention/paged_decode_sm80.cuh"
#include "attention/paged_extend.cuh"
#include "attention/paged_kv.h"
#include "attention/paged_prefill.cuh"
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

// Bytes, of rows of q and of caches in its dtype: all loads are of so many.
inline constexpr int64_t kRowAlignment = 16;

// What rows of a cache must be multiples of: all that their loads need, and rows of any D have.
inline void check_cache_alignment(const char* op, const View& cache) {
  const int64_t row_bytes = cache.size(-1);
  const int64_t alignment = is_quantized_kv(cache.dtype)
                                ? std::min(kRowAlignment, row_bytes & -row_bytes)
                                : kRowAlignment;
  Match(op, cache).aligned(alignment, element_bytes(cache.dtype));
}

// What kernels want to have worked out beforehand.
inline void prepare_args(PagedAttentionArgs& args) {
  args.max_seqlen_q = std::min(args.max_seqlen_q, args.num_tokens);
  args.page_size_divisor = FastDivisor::of(args.page_size);
  args.group = static_cast<int32_t>(args.num_q_heads / args.num_kv_heads);
  args.group_divisor = FastDivisor::of(args.group);
  args.table_heads_divisor = FastDivisor::of(args.table_heads);
  args.split_size_divisor = FastDivisor::of(std::max<int64_t>(args.split_size, 1));
  args.max_rows = INT32_MAX;
  args.num_tables = static_cast<int32_t>(args.num_seqs * args.table_heads);
  args.heads_per_table = static_cast<int32_t>(args.num_kv_heads / args.table_heads);
}

// How many CTAs share the keys, and memory for what they leave.
template <class Config>
void share_keys(PagedAttentionArgs& args, const AttentionContext& context) {
  const int num_sms = context.attribute(cudaDevAttrMultiProcessorCount);
  args.early_start = context.attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const int64_t max_rows = std::min<int64_t>(args.group * args.max_seqlen_q, args.max_rows);
  args.num_row_tiles = static_cast<int32_t>(ceil_div<int64_t>(max_rows, Config::kRows));
  // As many CTAs as run together, or as parts that are worth one.
  const int64_t resident =
      std::clamp<int64_t>(num_sms * Config::kCtasPerSm / args.num_row_tiles, 1, kMaxShares);
  const int64_t pairs = args.num_seqs * args.num_kv_heads;
  const int64_t table_keys = args.max_pages_per_seq * args.page_size;
  const int64_t max_keys = std::min(table_keys, args.sink_tokens + args.window + args.max_seqlen_q);
  if (args.sink_tokens > 0 && args.split_size == 0) {
    // Pieces of no promised size, as no part may reach over the gap: for each CTA about one.
    const int64_t even = ceil_div(max_keys * pairs, resident);
    args.split_size = ceil_div(std::max<int64_t>(even, Config::kUnsplitBlocks * Config::kBlockKeys),
                               kSplitSizeStep) *
                      kSplitSizeStep;
    args.split_size_divisor = FastDivisor::of(args.split_size);
  }
  const bool fixed = args.split_size > 0;
  const int64_t part_keys = fixed ? args.split_size : Config::kMinBlocks * Config::kBlockKeys;
  int64_t parts_per_pair = std::max<int64_t>(ceil_div(max_keys, part_keys), 1);
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
  const int64_t tiles = pairs * args.num_row_tiles;
  args.partial_out = context.allocate(rows * (args.head_dim + 2) + (slots + tiles) * 2);
  args.partial_softmax = args.partial_out + rows * args.head_dim;
  args.arrivals = reinterpret_cast<uint64_t*>(args.partial_softmax + rows * 2);
  args.pair_parts = reinterpret_cast<int2*>(args.arrivals + slots);
}

template <class Config>
void decode(PagedAttentionArgs args, const AttentionContext& context) {
  share_keys<Config>(args, context);
  launch_paged_decode<Config>(args, context.stream);
}

template <class Config>
void extend(PagedAttentionArgs args, const AttentionContext& context) {
  share_keys<Config>(args, context);
  launch_paged_extend<Config>(args, context.stream);
}

template <class Element, class Kv, int kHeadDim>
void launch_paged_attention(PagedAttentionArgs args, const AttentionContext& context) {
  // Up to here it pays to read the keys once per 8 rows, from L2 after the first time.
  constexpr int32_t kMaxDecodeRows = 16;
  // More than a tile of rows: keys are split where row tiles are too few for the GPU. The prefill
  // kernel has a CTA for all keys of a tile, and no masks of trees.
  using Prefill = PagedPrefillConfig<Element, kHeadDim, Kv>;
  using Extend = PagedExtendConfig<Element, kHeadDim, Kv>;
  const int64_t max_rows = args.group * args.max_seqlen_q;
  const int64_t tiles =
      args.num_seqs * args.num_kv_heads * ceil_div<int64_t>(max_rows, Prefill::kBlockM);
  const bool fills_gpu = tiles >= context.attribute(cudaDevAttrMultiProcessorCount);
  // The batch chooses the kernel, unless it must not show: then each sequence by its own rows.
  const bool fixed = args.split_size > 0;
  if (max_rows > Extend::kRows && args.tree_mask == nullptr && (fixed || fills_gpu)) {
    if (fixed) args.min_rows = Extend::kRows + 1;
    launch_paged_prefill<Prefill>(args, context.stream);
    if (!fixed) return;
    args.max_rows = Extend::kRows;
  }
  if (max_rows > kMaxDecodeRows) {
    args.min_rows = fixed ? kMaxDecodeRows + 1 : 0;
    extend<Extend>(args, context);
    if (!fixed) return;
    args.min_rows = 0, args.max_rows = kMaxDecodeRows;
  }
  // Shared memory is for four warps of D = 256.
  constexpr int kWarps = kHeadDim == 256 || std::is_same_v<Kv, KvInt4> ? 4 : 8;
  using Config = PagedDecodeConfig<Element, kHeadDim, kWarps, Kv>;
  if constexpr (Config::kQuantized) {
    if (args.head_dim % DecodeKv<Config>::kKeyUnitDims != 0) {
      return decode<PagedDecodeConfig<Element, 256, 4, Kv, true>>(args, context);
    }
  } else if constexpr (kHeadDim == 128) {
    // Few pairs are split, and what CTAs leave behind must be merged at a price per CTA: one has
    // the multiprocessor. With many, the other of two loads while one goes to its next pair:
    // measured on an H100, up to 10 % quicker.
    const int num_sms = context.attribute(cudaDevAttrMultiProcessorCount);
    if (args.split_size == 0 && args.num_seqs * args.num_kv_heads > num_sms) {
      return decode<PagedDecodeConfig<Element, kHeadDim, 4, Kv>>(args, context);
    }
  }
  decode<Config>(args, context);
}

template <class Element, class Kv>
void launch_paged_attention(const PagedAttentionArgs& args, const AttentionContext& context) {
  if (args.head_dim <= 64) {
    launch_paged_attention<Element, Kv, 64>(args, context);
  } else if (args.head_dim <= 128) {
    launch_paged_attention<Element, Kv, 128>(args, context);
  } else {
    launch_paged_attention<Element, Kv, 256>(args, context);
  }
}

// `Codec` is that of a quantised cache, or void: the cache has the dtype of q.
template <class Codec>
void launch_paged_attention(const PagedAttentionArgs& args, const AttentionContext& context) {
  const auto launch = [&](auto element) {
    using Element = decltype(element);
    using Kv = std::conditional_t<std::is_void_v<Codec>, Element, Codec>;
    launch_paged_attention<Element, Kv>(args, context);
  };
  if (args.dtype == DType::kFloat16) {
    launch(float16{});
  } else {
    launch(bfloat16{});
  }
}

// Compiled in a file each: paged_attention.cu and paged_attention_<dtype>.cu.
extern template void launch_paged_attention<void>(const PagedAttentionArgs&,
                                                  const AttentionContext&);
extern template void launch_paged_attention<KvE4M3>(const PagedAttentionArgs&,
                                                    const AttentionContext&);
extern template void launch_paged_attention<KvInt8>(const PagedAttentionArgs&,
                                                    const AttentionContext&);
extern template void launch_paged_attention<KvInt4>(const PagedAttentionArgs&,
                                                    const AttentionContext&);

}  // namespace effllm
