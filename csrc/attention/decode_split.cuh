// How decode attention is shared out to CTAs. Each CTA finds its share by itself from the lengths
// in device memory: nothing is planned ahead, so that a CUDA graph follows its lengths.
//
//   pairs (page table, head)    | 0,0      | 0,1      | 1,0  | 1,1  | 3,0                  | 3,1 ..
//   blocks of kBlockKeys keys   |. b b b b b . b b b b b . b b b . b b b . b b b b b b b b b . b b
//   shares, equally long        |      0      |      1      |      2      |      3      |     ..
//
// All blocks that some query sees, those of the head first, stand in one row, and each share is a
// piece of it. A pair begins with empty places, for what a CTA pays to start on it; one without
// keys has no place at all. Where about the same size of share lets no CTA have parts of two pairs,
// pairs are rounded up to whole shares instead: one sequence is then cut evenly, and sequences of
// one length alike.
//
// With a split_size, a place is a piece of so many keys, counted from a multiple of it, and each
// piece is a part of its own: who has it does not show in the result. So it is where a head stays
// visible: no part has keys on both sides of the gap.
//
// No clusters, which would merge through each other's shared memory: their size is the launch's,
// and known before the lengths are. One long sequence among short ones needs all CTAs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/paged_row_tile_storage.cuh"
#include "attention/paged_sequence.cuh"
#include "common/math.h"
#include "ptx/cluster.cuh"

namespace effllm {

// `Kv_` is the cache's element, or the codec of a quantised one; `kNarrow`: rows whose bytes no
// wider load divides are read 8 elements at a time; `kScores`: h2o_attention's (decode_scores.cuh).
template <class Element_, int kHeadDim_, int kWarps_, class Kv_ = Element_, bool kNarrow_ = false,
          bool kScores_ = false>
struct PagedDecodeConfig {
  using Element = Element_;
  using Kv = Kv_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kNarrow = kNarrow_;
  static constexpr bool kScores = kScores_;
  using LoadLengths = std::conditional_t<kScores, LoadOfOneQuery<LoadCached>, LoadCached>;
  using LoadLengthsPastL1 = std::conditional_t<kScores, LoadOfOneQuery<LoadPastL1>, LoadPastL1>;
  static constexpr bool kQuantized = !std::is_same_v<Element, Kv>;
  static constexpr bool kInt4 = std::is_same_v<Kv, KvInt4>;
  static constexpr int kRows = 8;  // packed rows of a CTA
  // Keys of a warp's step. What a step costs beside its keys is much where these are of 4 bits.
  static constexpr int kTileKeys = kInt4 && kHeadDim <= 128 ? 32 : 16;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTileThreads = kThreads;
  static constexpr int kMaxTeams = 1, kMaxCluster = 1;
  // As registers allow. Codes take fewer, and need more warps for as many bytes on the way.
  static constexpr int kWarpsPerSm = kHeadDim == 64                  ? 16
                                     : kHeadDim == 128 && kQuantized ? (kInt4 ? 12 : 16)
                                                                     : 8;
  static constexpr int kCtasPerSm = kWarpsPerSm / kWarps;
  static constexpr int kTeamsPerSm = kCtasPerSm;
  // Whether scores of whole pairs stay in shared memory. Codes have more warps, which take more of
  // it: two CTAs with 4096 keys 208 KB. 28 KB then remain of L1, where loads on their way arrive,
  // and decoding is 6 % slower on an H100; 16 bits, with 60 KB, gain 2 %.
  static constexpr bool kKeepsScores = kScores && !kQuantized;
  // Parts of a row that are on the way together when they are merged.
  static constexpr int kMergeBatch = kScores && kWarpsPerSm > 12 ? 8 : 16;
  // V arrives while the scores are computed, and the next K while V is used. K and V of D = 256
  // together do not fit into the registers of a thread: there the other warps hide the latency.
  static constexpr bool kOverlapLoads = kQuantized || kHeadDim <= 128;
  // Whether the page table is asked a tile ahead. Registers for it are free at D = 128.
  static constexpr bool kFindsAhead = kHeadDim == 128 && (!kQuantized || kInt4);
  // What shares are made of, and in these blocks: the least that is worth a CTA, a tile for every
  // warp; what to load takes no longer than to merge the parts of; the price of a start.
  static constexpr int kBlockKeys = 64;
  static_assert(kSplitSizeStep % kBlockKeys == 0);
  static constexpr int kMinBlocks = kWarps * kTileKeys / kBlockKeys;
  static constexpr int kUnsplitBlocks = 384 / kBlockKeys;
  static constexpr int kStartBlocks = 128 / kBlockKeys;
  static_assert(kHeadDim % 64 == 0, "a lane owns whole chunks of V");
};

// The row tile of a CTA and the keys its rows see.
template <class Config>
struct DecodeTile {
  int first_row, num_rows;  // num_rows counts the whole (sequence, KV head)
  KeyRange keys;

  __device__ __forceinline__ DecodeTile(const PagedAttentionArgs& args, const Sequence& sequence,
                                        int row_tile)
      : first_row(row_tile * Config::kRows),
        num_rows(sequence.num_queries * args.group),
        keys{0, 0} {
    if (empty()) return;
    const int last_row = min(first_row + Config::kRows, num_rows) - 1;
    // In a tree no query is certain to stand before all others but the first of the sequence.
    const int first_query = args.tree_mask != nullptr ? 0 : args.group_divisor.quotient(first_row);
    keys = sequence.visible_keys(args, first_query, args.group_divisor.quotient(last_row));
  }

  __device__ __forceinline__ bool empty() const { return first_row >= num_rows; }
};

// Of the keys of the head: whole pieces, where there are any.
template <class Config>
__device__ __forceinline__ unsigned head_blocks(const PagedAttentionArgs& args,
                                                const SeenKeys& seen) {
  if (seen.head_end == 0) return 0;
  const FastDivisor& split = args.split_size_divisor;
  const unsigned whole = (split.quotient(seen.head_end - 1) + 1) * split.divisor;
  return ceil_div<unsigned>(whole, Config::kBlockKeys);
}

// What a share has of a pair: blocks [begin, end), none if it has but an empty place.
struct DecodePart {
  int table_idx, head;  // the head is one of those that share the table
  int begin, end;
  int idx, num_parts, first_slot;  // part i is left in slot first_slot + i
};

// The keys that a row tile sees of a part's: of the head, or behind it.
template <class Config>
__device__ __forceinline__ KeyRange keys_of_part(const PagedAttentionArgs& args,
                                                 const SeenKeys& seen, const DecodePart& part,
                                                 const KeyRange& of_tile) {
  const auto in_head = static_cast<int>(head_blocks<Config>(args, seen));
  const bool is_head = part.begin < in_head;
  const int first = part.begin - (is_head ? 0 : in_head);
  const KeyRange of_pair = is_head ? KeyRange{0, seen.head_end} : seen.keys;
  const auto num_keys =
      static_cast<int>(min((int64_t{part.end} - part.begin + first) * Config::kBlockKeys,
                           int64_t{of_pair.end} - of_pair.begin));
  return {max(of_pair.begin + first * Config::kBlockKeys, is_head ? 0 : of_tile.begin),
          min(of_pair.begin + num_keys, of_tile.end)};
}

// Of keys that a cluster has, those of a team of this CTA: whole blocks, as even as can be.
template <class Config>
__device__ __forceinline__ KeyRange keys_of_team(const KeyRange& keys, uint32_t team) {
  if constexpr (Config::kMaxCluster * Config::kMaxTeams == 1) return keys;
  const uint32_t teams = ptx::cluster_size() * num_teams<Config>();
  const uint32_t idx = ptx::cluster_rank() * num_teams<Config>() + team;
  const uint32_t blocks = ceil_div(max(keys.end - keys.begin, 0), Config::kBlockKeys);
  const uint32_t each = blocks / teams, more = blocks - each * teams;  // the first have one more
  const auto border = [&](uint32_t idx) {
    const auto before = static_cast<int>(each * idx + min(idx, more));
    return min(keys.begin + before * Config::kBlockKeys, keys.end);
  };
  return {border(idx), border(idx + 1)};
}

// The pairs of one share, from the last to the first: the CTA that has the first part of a pair
// that others have parts of thus begins with it. Row tiles of the same keys have the same shares,
// side by side, and meet in L2. A warp computes it, its lanes look at a table each, and leaves it
// in shared memory for all: it would cost registers otherwise.
template <class Config>
class DecodeSchedule {
 public:
  // All that a schedule is made of, where 32 tables are all: blocks of the keys that are seen in
  // this lane's. The lengths are looked up once.
  static __device__ __forceinline__ unsigned blocks_of_lane(const PagedAttentionArgs& args) {
    return count_blocks(args, lane_idx());
  }

  __device__ __forceinline__ void start(const PagedAttentionArgs& args, unsigned of_first,
                                        int share_idx) {
    choose_shares(args, of_first);
    share_idx_ = share_idx;
    begin_ = share_idx * share_size_;
    find_last_pair(args, of_first);
    cut_first_part(args);
  }

  // Whether there is a part; `advance` goes to the next one.
  __device__ __forceinline__ bool valid() const { return num_blocks_ > 0; }
  __device__ __forceinline__ const DecodePart& part() const { return part_; }
  // Whether no share has parts of two pairs.
  __device__ __forceinline__ bool one_part_each() const { return lead_ == 0; }

  __device__ __forceinline__ void advance(const PagedAttentionArgs& args) {
    if (args.split_size > 0) {
      const unsigned next = pair_begin_ + part_.idx + 1;
      if (next < min(pair_begin_ + places(num_blocks_), begin_ + share_size_)) {
        cut_piece(next);
        return;
      }
    }
    const bool share_done = pair_begin_ <= begin_;
    if (share_done) {
      num_blocks_ = 0;
      return;
    }
    if (part_.head > 0) {
      --part_.head;
    } else {
      find_table_before(args);
    }
    pair_begin_ -= places(num_blocks_);
    cut_first_part(args);
  }

 private:
  __device__ __forceinline__ static int lane_idx() { return static_cast<int>(threadIdx.x % 32); }

  // Rounded up. In 32 bits where these do: a quotient of 64 bits is a long routine.
  __device__ __forceinline__ static uint64_t ceil_quotient(uint64_t value, uint32_t divisor) {
    value += divisor - 1;
    return value >> 32 == 0 ? static_cast<uint32_t>(value) / divisor : value / divisor;
  }

  // Blocks of the keys that a sequence's queries see.
  __device__ __forceinline__ static unsigned count_blocks(const PagedAttentionArgs& args,
                                                          int table_idx) {
    if (table_idx < 0 || table_idx >= args.num_tables) return 0;
    const Sequence sequence(args, table_idx, typename Config::LoadLengthsPastL1{});
    const SeenKeys seen = sequence.seen_keys(args);
    const unsigned blocks = head_blocks<Config>(args, seen) +
                            ceil_div<unsigned>(seen.keys.end - seen.keys.begin, Config::kBlockKeys);
    return sequence.is_taken(args) ? blocks : 0;
  }

  // The same, of this lane's table from `first` on.
  __device__ __forceinline__ static unsigned count_blocks(const PagedAttentionArgs& args, int first,
                                                          unsigned of_first) {
    return first == 0 ? of_first : count_blocks(args, first + lane_idx());
  }

  // Places of a pair of so many blocks.
  __device__ __forceinline__ unsigned places(unsigned num_blocks) const {
    if (num_blocks == 0) return 0;
    return lead_ + (place_blocks_ == 1 ? num_blocks : ceil_div(num_blocks, place_blocks_));
  }

  __device__ __forceinline__ void choose_shares(const PagedAttentionArgs& args, unsigned of_first) {
    const auto num_shares = static_cast<uint64_t>(args.num_shares);
    lead_ = 0, share_size_ = 1;
    if (args.split_size > 0) {
      const uint64_t of_piece = args.split_size / Config::kBlockKeys;
      place_blocks_ = static_cast<unsigned>(min(of_piece, kMaxBlocks));
      const uint64_t even = ceil_quotient(count_places(args, of_first), args.num_shares);
      share_size_ = static_cast<unsigned>(max(even, uint64_t{1}));
      return;
    }
    uint64_t blocks = 0, pairs = 0;
    unsigned longest = 0;
    for (int first = 0; first < args.num_tables; first += 32) {
      const unsigned of_lane = count_blocks(args, first, of_first);
      blocks += __reduce_add_sync(~0u, of_lane);
      pairs += __popc(__ballot_sync(~0u, of_lane > 0));
      longest = max(longest, __reduce_max_sync(~0u, of_lane));
    }
    blocks *= args.heads_per_table, pairs *= args.heads_per_table;
    const uint64_t all = blocks + Config::kStartBlocks * pairs;
    constexpr unsigned kUnsplitBlocks = Config::kUnsplitBlocks;
    const uint64_t least = longest > kUnsplitBlocks ? Config::kMinBlocks : kUnsplitBlocks;
    const uint64_t even = max(ceil_quotient(all, args.num_shares), least);
    // Pairs in whole shares, if these need not be much larger for it. The second size is certain to
    // do: rounding adds less than one share for each pair.
    if (pairs <= num_shares) {
      place_blocks_ = static_cast<unsigned>(min(even, kMaxBlocks));
      if (count_places(args, of_first) <= num_shares) return;
    }
    if (pairs < num_shares) {
      // Where all are of one length, as many shares for each as there can be.
      const auto per_pair = static_cast<unsigned>(num_shares) / static_cast<unsigned>(pairs);
      const uint64_t enough =
          max(min(ceil_quotient(blocks, static_cast<uint32_t>(num_shares - pairs)),
                  uint64_t{ceil_div(longest, per_pair)}),
              even);
      place_blocks_ = static_cast<unsigned>(min(enough, kMaxBlocks));
      if (enough <= even + Config::kStartBlocks) return;
    }
    // A place is a block, or more where places would else be too many to be counted in 32 bits.
    lead_ = Config::kStartBlocks;
    place_blocks_ = static_cast<unsigned>(1 + (all >> 30));
    share_size_ = static_cast<unsigned>(
        place_blocks_ == 1
            ? even
            : ceil_quotient(blocks / place_blocks_ + (1 + lead_) * pairs, args.num_shares));
  }

  // Of all pairs.
  __device__ __forceinline__ uint64_t count_places(const PagedAttentionArgs& args,
                                                   unsigned of_first) const {
    uint64_t count = 0;
    for (int first = 0; first < args.num_tables; first += 32) {
      count += __reduce_add_sync(~0u, places(count_blocks(args, first, of_first)));
    }
    return count * args.heads_per_table;
  }

  // The pair that holds the share's last place, or the last pair of all if that is before.
  __device__ __forceinline__ void find_last_pair(const PagedAttentionArgs& args,
                                                 unsigned of_first) {
    const int lane = lane_idx();
    const auto num_heads = static_cast<unsigned>(args.heads_per_table);
    // Heads of a table are alike: places are counted for one of them.
    const unsigned last_place = (begin_ + share_size_ - 1) / num_heads;
    unsigned places_before = 0;
    num_blocks_ = 0;
    for (int first = 0; first < args.num_tables && places_before <= last_place; first += 32) {
      const unsigned blocks = count_blocks(args, first, of_first);
      const unsigned of_lane = places(blocks);
      unsigned up_to_lane = of_lane;
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const unsigned below = __shfl_up_sync(~0u, up_to_lane, lanes);
        if (lane >= lanes) up_to_lane += below;
      }
      // The last table of these 32 that begins in the share or before.
      const unsigned begun =
          __ballot_sync(~0u, of_lane > 0 && places_before + up_to_lane - of_lane <= last_place);
      if (begun != 0) {
        const int lane_of_last = 31 - __clz(static_cast<int>(begun));
        part_.table_idx = first + lane_of_last;
        num_blocks_ = __shfl_sync(~0u, blocks, lane_of_last);
        pair_begin_ =
            (places_before + __shfl_sync(~0u, up_to_lane - of_lane, lane_of_last)) * num_heads;
      }
      places_before += __shfl_sync(~0u, up_to_lane, 31);
    }
    if (num_blocks_ == 0) return;
    const unsigned of_pair = places(num_blocks_);
    const unsigned head = (begin_ + share_size_ - 1 - pair_begin_) / of_pair;
    part_.head = static_cast<int>(min(head, num_heads - 1));
    pair_begin_ += part_.head * of_pair;
    if (pair_begin_ + of_pair <= begin_) num_blocks_ = 0;  // all pairs end before this share
  }

  // To the last pair of the nearest table before this one that has keys, if there is one.
  __device__ __forceinline__ void find_table_before(const PagedAttentionArgs& args) {
    num_blocks_ = 0;
    for (int end = part_.table_idx; end > 0 && num_blocks_ == 0; end -= 32) {
      const unsigned blocks = count_blocks(args, end - 1 - lane_idx());
      const unsigned with_keys = __ballot_sync(~0u, blocks > 0);
      if (with_keys == 0) continue;
      const int lane_of_nearest = __ffs(static_cast<int>(with_keys)) - 1;
      part_.table_idx = end - 1 - lane_of_nearest;
      num_blocks_ = __shfl_sync(~0u, blocks, lane_of_nearest);
    }
    part_.head = args.heads_per_table - 1;
  }

  // Of the current pair: what this share has of it, or the first piece of that.
  __device__ __forceinline__ void cut_first_part(const PagedAttentionArgs& args) {
    if (args.split_size > 0) {
      cut_piece(max(pair_begin_, begin_));
      return;
    }
    const unsigned first = pair_begin_ + lead_, last = pair_begin_ + places(num_blocks_) - 1;
    const auto block_at = [&](unsigned place) {
      return place <= first ? 0u : min((place - first) * place_blocks_, num_blocks_);
    };
    part_.begin = static_cast<int>(block_at(begin_));
    part_.end = static_cast<int>(block_at(min(begin_ + share_size_, last + 1)));
    part_.first_slot = static_cast<int>(share_of(first));
    part_.idx = share_idx_ - part_.first_slot;
    part_.num_parts = static_cast<int>(share_of(last)) - part_.first_slot + 1;
  }

  __device__ __forceinline__ void cut_piece(unsigned place) {
    const unsigned idx = place - pair_begin_, first_block = idx * place_blocks_;
    part_.begin = static_cast<int>(first_block);
    part_.end = static_cast<int>(min(first_block + place_blocks_, num_blocks_));
    part_.first_slot = static_cast<int>(pair_begin_);
    part_.idx = static_cast<int>(idx);
    part_.num_parts = static_cast<int>(places(num_blocks_));
  }

  __device__ __forceinline__ unsigned share_of(unsigned place) const {
    return share_size_ == 1 ? place : place / share_size_;
  }

  // No sequence has more: lengths are of 31 bits.
  static constexpr uint64_t kMaxBlocks = (uint64_t{1} << 31) / Config::kBlockKeys;

  DecodePart part_;
  int share_idx_;
  unsigned lead_;          // empty places at the beginning of a pair
  unsigned place_blocks_;  // blocks of a place
  unsigned share_size_;    // places of a share
  unsigned begin_;         // first place of this share
  unsigned pair_begin_;    // first place of the current pair
  unsigned num_blocks_;    // of the current pair; 0: there is none
};

}  // namespace effllm
