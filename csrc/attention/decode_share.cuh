// What a CTA does around its parts, in kernels that split keys over CTAs: it finds its share, asks
// for its first keys early, and goes from part to part.
#pragma once

#include "attention/decode_prefetch.cuh"
#include "attention/decode_split.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid.cuh"

namespace effllm {

// In shared memory.
template <class Config>
struct DecodeShare {
  DecodeSchedule<Config> schedule;
  int row_tile;
};

// Clears the tokens that have no row tile: those that no CTA computes, and all of page tables
// without a visible key, for their heads. These are dealt out to the CTAs one by one.
template <class Config>
__device__ __forceinline__ void clear_keyless_tokens(const PagedAttentionArgs& args) {
  using Element = typename Config::Element;
  for (int64_t table_idx = blockIdx.x; table_idx < args.num_tables; table_idx += gridDim.x) {
    const Sequence sequence(args, static_cast<int>(table_idx), typename Config::LoadLengths{});
    if (!sequence.is_taken(args)) continue;
    const bool keyless = sequence.seen_keys(args).empty();
    const bool all_owned =
        sequence.first_token + sequence.num_queries == sequence.end_token &&
        (sequence.seq_idx > 0 || sequence.first_token == 0) &&
        (sequence.seq_idx + 1 < args.num_seqs || sequence.end_token == args.num_tokens);
    if (!keyless && all_owned) continue;
    for (int head = 0; head < args.heads_per_table; ++head) {
      const int kv_head = sequence.first_kv_head + head;
      clear_unowned_tokens<Element>(args, sequence, kv_head);
      if (keyless) {
        clear_tokens<Element>(args, sequence.first_token,
                              sequence.first_token + sequence.num_queries, kv_head);
      }
    }
  }
}

// Calls `do_part`, with all threads, for each part of the CTA's share: share.schedule.part() of
// share.row_tile. The kernel may be launched before the one ahead of it is done.
template <class Config, class DoPart>
__device__ __forceinline__ void for_each_part(const PagedAttentionArgs& args,
                                              DecodeShare<Config>& share, DoPart do_part) {
  const auto num_row_tiles = static_cast<unsigned>(args.num_row_tiles);
  // The CTAs of a cluster have a share together.
  const unsigned owner = Config::kMaxCluster == 1 ? blockIdx.x : blockIdx.x / ptx::cluster_size();
  prefetch_tables<Config>(args);
  unsigned of_first = 0;  // as warp 0 counts blocks
  // Twice in one place: all code of a kernel has to be fetched, and this is much.
#pragma unroll 1
  for (bool is_early = args.early_start;; is_early = false) {
    if (!is_early) {
      ptx::grid_dependency_wait();
      ptx::grid_launch_dependents();
    }
    if (threadIdx.x < 32) {
      // Nothing but the blocks of 32 tables went into a share that was found early: of the same
      // ones it is the share that all others find, whatever lengths stood there in the meantime.
      // What keys the blocks hold is looked up for each part.
      const unsigned blocks = DecodeSchedule<Config>::blocks_of_lane(args);
      const bool is_known = !is_early && args.early_start && args.num_tables <= 32;
      if (!__all_sync(~0u, is_known && blocks == of_first)) {
        DecodeSchedule<Config> schedule;
        schedule.start(args, blocks, static_cast<int>(owner / num_row_tiles));
        if (threadIdx.x == 0) {
          share.schedule = schedule;
          share.row_tile = static_cast<int>(owner % num_row_tiles);
        }
      }
      of_first = blocks;
    }
    if (!is_early) break;
    __syncthreads();
    if (share.schedule.valid()) prefetch_part<Config>(args, share.schedule.part());
    __syncthreads();
  }
  clear_keyless_tokens<Config>(args);  // by the other warps in the meantime
  __syncthreads();
  while (share.schedule.valid()) {
    do_part();
    __syncthreads();  // all have done with shared memory
    if (threadIdx.x < 32) {
      DecodeSchedule<Config> schedule = share.schedule;
      schedule.advance(args);
      __syncwarp();
      if (threadIdx.x == 0) share.schedule = schedule;
    }
    __syncthreads();
  }
}

}  // namespace effllm
