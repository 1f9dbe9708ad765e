// What attention kernels get beside the op's Params, and where a key of a sequence lies.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "attention/paged_attention.h"

#ifdef __CUDACC__
#define EFFLLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EFFLLM_HOST_DEVICE inline
#endif

namespace effllm {

// Quotients of numbers in [0, 2^31) by a number known at launch: a multiplication and a shift,
// where the division instruction sequence of a GPU would take about twenty.
struct FastDivisor {
  uint32_t divisor, multiplier, shift;

  // Divisors of 2^31 and more give the quotient 0 of 2^31 - 1.
  static FastDivisor of(int64_t divisor) {
    const auto d = static_cast<uint32_t>(std::min<int64_t>(divisor, INT32_MAX));
    const auto log2_ceil = static_cast<uint32_t>(std::bit_width(d - 1));
    // ceil(2^(31 + log2_ceil) / d) < 2^32; its error times 2^31 stays under one unit of the
    // quotient.
    const uint64_t multiplier = ((uint64_t{1} << (31 + log2_ceil)) + d - 1) / d;
    return {d, static_cast<uint32_t>(multiplier), d == 1 ? 0 : log2_ceil - 1};
  }

  EFFLLM_HOST_DEVICE uint32_t quotient(uint32_t value) const {
    const auto high = static_cast<uint32_t>((uint64_t{value} * multiplier) >> 32);
    return divisor == 1 ? value : high >> shift;
  }
};

// The argument of every paged attention kernel.
//
// Rows are packed: row r of a (sequence, KV head) pair is head r % group of its query r / group, so
// that one read of the KV head serves all query heads that share it.
struct PagedAttentionArgs : PagedAttentionParams {
  FastDivisor page_size_divisor, group_divisor, table_heads_divisor;
  FastDivisor split_size_divisor;  // 1 without a split_size
  int32_t group;                   // query heads per KV head
  int32_t num_tables;              // page tables of all sequences: B, or B * HKV
  int32_t heads_per_table;         // KV heads
  int32_t num_row_tiles;           // tiles that cover group * max_seqlen_q rows
  // Of which sequences this launch takes care: those with so many rows.
  int32_t min_rows, max_rows;
  // Of kernels that split keys: shares of the keys, a CTA or a cluster each for every row tile, and
  // what these leave for who merges the parts of a row tile. A slot is a share's and has two
  // places, or, with a split_size, a piece's and has one.
  int32_t num_shares;
  bool early_start;        // whether the GPU can start it before the kernel ahead has finished
  float* partial_out;      // [slots, num_row_tiles, places, rows of a tile, D]
  float* partial_softmax;  // [slots, num_row_tiles, places, rows of a tile, 2]: maximum and sum
  uint64_t* arrivals;      // [slots, num_row_tiles, CTAs of a cluster]
  // Of h2o_attention, which has no cu_seqlens_q: [B, HKV, S], with 1 from slot to slot.
  float* scores;
  int64_t stride_scores_seq, stride_scores_head, num_score_slots;
  int32_t score_room;  // keys of a pair whose scores a CTA has room for in shared memory
};

// Page and slot of one key. Page ids are clamped: a wrong one reads a wrong page, never other
// memory.
struct KeyLocation {
  int64_t page, slot;

  EFFLLM_HOST_DEVICE KeyLocation(const PagedAttentionArgs& args, int64_t page_id, int64_t slot_idx)
      : page(page_id < 0                 ? 0
             : page_id >= args.num_pages ? args.num_pages - 1
                                         : page_id),
        slot(slot_idx) {}

  // In elements. 64 bits: a cache has more than 2^31 elements.
  EFFLLM_HOST_DEVICE int64_t k_offset(const PagedAttentionParams& params, int64_t head) const {
    return page * params.stride_k_page + slot * params.stride_k_slot + head * params.stride_k_head;
  }
  EFFLLM_HOST_DEVICE int64_t v_offset(const PagedAttentionParams& params, int64_t head) const {
    return page * params.stride_v_page + slot * params.stride_v_slot + head * params.stride_v_head;
  }
  // Of a quantised cache.
  EFFLLM_HOST_DEVICE uint32_t word(const KvScales& scales, int64_t head) const {
    return scales
        .words[page * scales.stride_page + slot * scales.stride_slot + head * scales.stride_head];
  }
};

// `page_row` is the sequence's row of the page table; `key` is below the sequence's length.
EFFLLM_HOST_DEVICE KeyLocation locate_key(const PagedAttentionArgs& args, const int32_t* page_row,
                                          int key) {
  const auto entry = args.page_size_divisor.quotient(static_cast<uint32_t>(key));
  return {args, page_row[entry], key - static_cast<int64_t>(entry) * args.page_size};
}

}  // namespace effllm

#undef EFFLLM_HOST_DEVICE
