// What decode attention asks to come to L2 before it needs it.
//
// A kernel that may start before the one ahead is done has nothing to do until then, and behind it
// lies a chain of misses: lengths, page table, keys. So each CTA finds its share from the lengths
// as they stand, and asks for the keys and values that the page table has there as it stands. If
// the kernel ahead changes them, what comes is not used: everything is read again, past L1, and
// page ids are clamped here too. A step of decoding appends a key; the others it asks for are
// right.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/decode_split.cuh"
#include "attention/paged_sequence.cuh"
#include "ptx/load.cuh"

namespace effllm {

// The lengths as a warp has read them, if its lanes could read all.
class DecodeLengths {
 public:
  __device__ __forceinline__ void load(const PagedAttentionArgs& args) {
    if (args.num_seqs > 32) return;
    const auto lane = static_cast<int>(threadIdx.x % 32);
    const LoadPastL1 load;
    if (lane <= args.num_seqs) first_token_ = load(args.cu_seqlens_q + lane);
    if (lane < args.num_seqs) num_keys_ = load(args.seq_lens + lane);
    if (lane == 31) end_token_ = load(args.cu_seqlens_q + args.num_seqs);
  }

  // By the whole warp that called load.
  __device__ __forceinline__ bool unchanged(const PagedAttentionArgs& args) const {
    DecodeLengths now;
    now.load(args);
    return __all_sync(~0u, args.num_seqs <= 32 && now.first_token_ == first_token_ &&
                               now.num_keys_ == num_keys_ && now.end_token_ == end_token_);
  }

 private:
  int32_t first_token_ = 0, num_keys_ = 0, end_token_ = 0;
};

// Lengths and, if it is not large, the page table.
template <class Config>
__device__ __forceinline__ void prefetch_tables(const PagedAttentionArgs& args) {
  constexpr int64_t kLineInts = 128 / sizeof(int32_t), kMaxTableInts = 64 * 1024;
  const int64_t idx = (int64_t{blockIdx.x} * Config::kThreads + threadIdx.x) * kLineInts;
  if (idx < args.num_seqs) {
    ptx::prefetch_l2(args.seq_lens + idx);
    ptx::prefetch_l2(args.cu_seqlens_q + idx);
  }
  const int64_t table = (args.num_seqs - 1) * args.stride_page_table_seq + args.max_pages_per_seq;
  if (idx < table && table <= kMaxTableInts) ptx::prefetch_l2(args.page_table + idx);
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
  constexpr uint32_t kBytes = 64 * 1024 / Config::kCtasPerSm;
  const Sequence sequence(args, part.seq_idx, LoadPastL1{});
  const KeyRange seen = sequence.seen_keys(args);
  const int begin = seen.begin + part.begin * Config::kBlockKeys;
  // Less than nothing if the lengths have changed since the share was found.
  const int num_keys =
      std::max(0, std::min(seen.end - begin, (part.end - part.begin) * Config::kBlockKeys));
  const int64_t element_bytes = Config::kQuantized ? 1 : sizeof(typename Config::Element);
  const auto row_bytes = static_cast<uint32_t>(
      args.kv_dtype == DType::kUInt8 ? args.head_dim / 2 : args.head_dim * element_bytes);
  const uint32_t lines = ceil_div(row_bytes, kLine);
  const uint32_t keys = std::min(static_cast<uint32_t>(num_keys), kBytes / 2 / row_bytes);
  for (uint32_t i = threadIdx.x; i < keys * lines; i += Config::kThreads) {
    const uint32_t key = begin + i / lines, offset = i % lines * kLine;
    const uint32_t entry = args.page_size_divisor.quotient(key);
    const KeyLocation location(args, LoadPastL1{}(sequence.page_row + entry),
                               key - entry * static_cast<uint32_t>(args.page_size));
    ptx::prefetch_l2(static_cast<const char*>(args.k_cache) +
                     location.k_offset(args, part.kv_head) * element_bytes + offset);
    ptx::prefetch_l2(static_cast<const char*>(args.v_cache) +
                     location.v_offset(args, part.kv_head) * element_bytes + offset);
  }
}

}  // namespace effllm
