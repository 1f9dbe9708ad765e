// How decode attention is cut into CTAs: row tiles of packed rows, and splits of the keys they see.
// The host chooses their number from bounds, the kernels cut the true lengths.
#pragma once

#include <cstdint>

#include "attention/paged_sequence.cuh"
#include "common/math.h"

namespace effllm {

template <class Element_, int kHeadDim_>
struct PagedDecodeConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = 8;       // packed rows of a CTA
  static constexpr int kTileKeys = 16;  // keys of a warp's step
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kCtasPerSm = kHeadDim == 64 ? 4 : 2;  // by registers
  // V arrives while the scores are computed, and the next K while V is used. K and V of D = 256
  // together do not fit into the registers of a thread: there the other warps hide the latency.
  static constexpr bool kOverlapLoads = kHeadDim <= 128;
  // What a split has at least: a tile for every warp.
  static constexpr int kSplitKeys = kWarps * kTileKeys;
  static_assert(kHeadDim % 64 == 0, "a lane owns whole chunks of V");
};

// The row tile of a CTA and the keys its rows see, cut into parts of whole tiles.
template <class Config>
struct DecodeTile {
  int first_row, num_rows;  // num_rows counts the whole (sequence, KV head)
  KeyRange keys;
  int keys_per_split, num_active_splits;

  __device__ __forceinline__ DecodeTile(const PagedAttentionArgs& args, const Sequence& sequence,
                                        int row_tile)
      : first_row(row_tile * Config::kRows),
        num_rows(sequence.num_queries * args.group),
        keys{0, 0},
        keys_per_split(0),
        num_active_splits(0) {
    if (first_row >= num_rows) return;
    const int last_row = min(first_row + Config::kRows, num_rows) - 1;
    keys = sequence.visible_keys(args, args.group_divisor.quotient(first_row),
                                 args.group_divisor.quotient(last_row));
    const int num_keys = keys.end - keys.begin;
    keys_per_split = round_up(ceil_div(num_keys, args.num_splits), Config::kSplitKeys);
    num_active_splits = num_keys > 0 ? ceil_div(num_keys, keys_per_split) : 0;
  }

  __device__ __forceinline__ KeyRange split(int split_idx) const {
    const int begin = keys.begin + split_idx * keys_per_split;
    return {begin, min(begin + keys_per_split, keys.end)};
  }
};

// Index of a row's partial results: split 0 of its tile, row 0.
template <class Config>
__device__ __forceinline__ int64_t partial_row(const PagedAttentionArgs& args, int seq_idx,
                                               int kv_head, int row_tile) {
  const int64_t tile =
      (int64_t{seq_idx} * args.num_kv_heads + kv_head) * args.num_row_tiles + row_tile;
  return tile * args.num_splits * Config::kRows;
}

// How many parts the keys of a (sequence, KV head, row tile) are cut into, so that the GPU's last
// wave of CTAs is not mostly idle. `max_keys` bounds the lengths, which only the device knows; the
// kernel makes fewer parts of a shorter sequence.
template <class Config>
int select_num_splits(int64_t num_tiles, int64_t num_sms, int64_t max_keys) {
  const int64_t slots = num_sms * Config::kCtasPerSm;
  constexpr int64_t kMaxSplits = 128;
  // Start, merge and drain of a CTA, in the time of as many keys.
  constexpr int64_t kOverheadKeys = 128;
  int64_t best_splits = 1, best_cost = INT64_MAX;
  for (int64_t splits = 1; splits <= kMaxSplits; ++splits) {
    const int64_t keys = round_up<int64_t>(ceil_div(max_keys, splits), Config::kSplitKeys);
    const int64_t cost = ceil_div(num_tiles * splits, slots) * (keys + kOverheadKeys);
    if (cost < best_cost) best_cost = cost, best_splits = splits;
  }
  return static_cast<int>(best_splits);
}

}  // namespace effllm
