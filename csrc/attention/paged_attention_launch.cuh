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
#include "attention/paged_extend_launch.cuh"
#include "attention/paged_kv.h"
#include "attention/paged_prefill.cuh"
#include "attention/share_keys.cuh"
#include "common/math.h"
#include "cuda/launch.h"
#include "quant/kv_layout.h"

namespace effllm {

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

template <class Config>
void decode(PagedAttentionArgs args, const AttentionContext& context) {
  const int num_sms = context.attribute(cudaDevAttrMultiProcessorCount);
  share_keys<Config>(args, context, num_sms * Config::kCtasPerSm);
  launch_paged_decode<Config>(args, context.stream);
}

// Rows of a KV head up to which decoding reads its keys once per 8 rows, from L2 after the first
// time. Of two such tiles the extend kernel is often quicker: its estimate, less what 16 rows save
// of 64, against a line through what decoding took on an H100 for 1 to 24 sequences of 4096 keys.
// Codes are fewer bytes to read twice: decoding was quicker, up to 1.6 times. With a split_size the
// batch must not show.
template <class Element, class Kv>
int32_t max_decode_rows(const PagedAttentionArgs& args, const AttentionContext& context) {
  constexpr bool kQuantized = !std::is_same_v<Element, Kv>;
  if (kQuantized || args.split_size > 0 || args.group * args.max_seqlen_q <= 8) return 16;
  const double of_16_rows = PagedExtend<Element, Kv>::estimate(args, context) - 1.75;
  return of_16_rows < 7.5 + 1.145 * key_us(args) ? 8 : 16;
}

template <class Element, class Kv, int kHeadDim>
void launch_paged_attention(PagedAttentionArgs args, const AttentionContext& context) {
  // More than a tile of rows: keys are split where row tiles are too few for the GPU. The prefill
  // kernel has a CTA for all keys of a tile, and no masks of trees.
  using Prefill = PagedPrefillConfig<Element, kHeadDim, Kv>;
  using Extend = PagedExtendConfig<Element, kHeadDim, Kv>;
  const int32_t decode_rows = max_decode_rows<Element, Kv>(args, context);
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
  if (max_rows > decode_rows) {
    args.min_rows = fixed ? decode_rows + 1 : 0;
    PagedExtend<Element, Kv>::launch(args, context);
    if (!fixed) return;
    args.min_rows = 0, args.max_rows = decode_rows;
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
