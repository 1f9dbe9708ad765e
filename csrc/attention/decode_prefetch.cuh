// What decode attention asks to come to L2 before it needs it.
//
// A kernel that may start before the one ahead is done has nothing to do until then, and behind it
// lies a chain of misses: lengths, page table, keys. So each CTA finds its share from the lengths
// as they stand, and asks for the keys and values that the page table has there as it stands. That
// is read past L1, so that nobody finds it there once the kernel ahead may have changed it, and
// page ids are clamped here too; everything is read again afterwards. A step of decoding appends a
// key: the others that were asked for are right.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/decode_split.cuh"
#include "attention/paged_sequence.cuh"
#include "ptx/load.cuh"

namespace effllm {

// Lengths and, if it is not large, the page table.
template <class Config>
__device__ __forceinline__ void prefetch_tables(const PagedAttentionArgs& args) {
  constexpr int64_t kLineInts = 128 / sizeof(int32_t), kMaxTableInts = 64 * 1024;
  const int64_t idx = (int64_t{blockIdx.x} * Config::kTileThreads + threadIdx.x) * kLineInts;
  if constexpr (!Config::kScores) {
    if (idx < args.num_seqs) ptx::prefetch_l2(args.cu_seqlens_q + idx);
  }
  // Both are of one row per sequence, and in it of one per head that has its own.
  const int64_t last_seq = args.num_seqs - 1, last_head = args.table_heads - 1;
  if (idx <= last_seq * args.stride_seq_lens_seq + last_head) ptx::prefetch_l2(args.seq_lens + idx);
  const int64_t table = last_seq * args.stride_page_table_seq +
                        last_head * args.stride_page_table_head + args.max_pages_per_seq;
  if (idx < table && table <= kMaxTableInts) ptx::prefetch_l2(args.page_table + idx);
  if (args.tree_mask != nullptr && idx < args.num_tokens * 2) {
    ptx::prefetch_l2(reinterpret_cast<const int32_t*>(args.tree_mask) + idx);
  }
}

// The keys' entries of the page table, 32 of them by each thread: of small pages there are many,
// and what a warp reads of them is not what it has read in the step before.
__device__ __forceinline__ void prefetch_page_row(const PagedAttentionArgs& args,
                                                  const Sequence& sequence, KeyRange keys) {
  const auto entry = args.page_size_divisor.quotient(keys.begin) + threadIdx.x * 32;
  if (keys.begin < keys.end && entry <= args.page_size_divisor.quotient(keys.end - 1)) {
    ptx::prefetch_l2(sequence.page_row + entry);
  }
}

// The first keys and values of a part, up to 64 KB for each multiprocessor.
template <class Config>
__device__ __forceinline__ void prefetch_part(const PagedAttentionArgs& args,
                                              const DecodePart& part) {
  constexpr uint32_t kLine = 128;
  constexpr uint32_t kBytes = 64 * 1024 / Config::kTeamsPerSm;
  const Sequence sequence(args, part.table_idx, typename Config::LoadLengthsPastL1{});
  const int kv_head = sequence.first_kv_head + part.head;
  const KeyRange keys = keys_of_team<Config>(
      keys_of_part<Config>(args, sequence.seen_keys(args), part, KeyRange{0, INT32_MAX}),
      team_idx<Config>());
  // Less than none if the lengths have changed since the share was found.
  const auto num_keys = static_cast<uint32_t>(std::max(keys.end - keys.begin, 0));
  const int64_t element_bytes = Config::kQuantized ? 1 : sizeof(typename Config::Element);
  const auto row_bytes = static_cast<uint32_t>(
      args.kv_dtype == DType::kUInt8 ? args.head_dim / 2 : args.head_dim * element_bytes);
  const uint32_t lines = ceil_div(row_bytes, kLine);
  const uint32_t num_lines = std::min(num_keys, kBytes / 2 / row_bytes) * lines;
  for (uint32_t i = thread_in_team<Config>(); i < num_lines; i += Config::kTileThreads) {
    const uint32_t key = keys.begin + i / lines, offset = i % lines * kLine;
    const uint32_t entry = args.page_size_divisor.quotient(key);
    const KeyLocation location(args, LoadPastL1{}(sequence.page_row + entry),
                               key - entry * static_cast<uint32_t>(args.page_size));
    ptx::prefetch_l2(static_cast<const char*>(args.k_cache) +
                     location.k_offset(args, kv_head) * element_bytes + offset);
    ptx::prefetch_l2(static_cast<const char*>(args.v_cache) +
                     location.v_offset(args, kv_head) * element_bytes + offset);
  }
}

}  // namespace effllm
