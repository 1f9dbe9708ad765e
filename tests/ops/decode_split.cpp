// Runs DecodeSchedule on the CPU for random batches; test_decode_split.py compiles it. Prints the
// first batch that is not shared out as decode_split.cuh promises and fails, or nothing.
#include "attention/decode_split.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <random>
#include <utility>
#include <vector>

namespace {

using effllm::ceil_div;
using effllm::DecodePart;
using effllm::PagedAttentionArgs;
using effllm::PagedAttentionParams;

struct Batch {
  std::vector<int> lengths, starts{0};  // a length for each table
  int num_kv_heads, num_shares;
  bool per_head;  // whether each KV head has a table
  int64_t window = PagedAttentionParams::kNoWindow, split_size = 0;
  int sink_tokens = 0;
  int max_rows = INT32_MAX;  // sequences with more are another kernel's
};

struct Piece {
  int share;
  DecodePart part;
};

template <class Config>
std::vector<Piece> share_out(const PagedAttentionArgs& args) {
  std::vector<Piece> pieces;
  for (int share = 0; share < args.num_shares; ++share) {
    warp::run([&] {
      effllm::DecodeSchedule<Config> schedule;
      schedule.start(args, schedule.blocks_of_lane(args), share);
      for (; schedule.valid(); schedule.advance(args)) {
        const DecodePart& part = schedule.part();
        if (threadIdx.x == 0 && part.begin < part.end) pieces.push_back({share, part});
      }
    });
  }
  return pieces;
}

// Whether the keys of a pair's parts are, for each row tile, those that its rows see, each once.
template <class Config>
bool has_seen_keys(const PagedAttentionArgs& args, const effllm::Sequence& sequence,
                   const std::vector<Piece>& pieces) {
  for (int row_tile = 0; row_tile * Config::kRows < sequence.num_queries; ++row_tile) {
    const effllm::DecodeTile<Config> tile(args, sequence, row_tile);
    std::vector<std::pair<int, int>> ranges;
    for (const Piece& piece : pieces) {
      const effllm::KeyRange range =
          effllm::keys_of_part<Config>(args, sequence.seen_keys(args), piece.part, tile.keys);
      if (!range.empty()) ranges.push_back({range.begin, range.end});
    }
    const int last = min(sequence.num_queries, (row_tile + 1) * Config::kRows) - 1;
    const int64_t end = max(min(sequence.first_position + last + 1, sequence.num_keys), 0);
    const int64_t first_position = sequence.first_position + row_tile * Config::kRows;
    const int64_t head = min<int64_t>(args.sink_tokens, end);
    const int64_t begin = max(head, first_position - args.window + 1);
    int64_t next = 0;
    std::sort(ranges.begin(), ranges.end());
    for (const auto& [from, to] : ranges) {
      if (next == head && from > next) next = begin;  // the gap
      if (from != next) return false;
      next = to;
    }
    if (next != end && !(next == head && begin >= end)) return false;
  }
  return true;
}

// The first promise that is broken; null if none is.
template <class Config>
const char* check(const Batch& batch) {
  PagedAttentionArgs args{};
  args.num_seqs = static_cast<int64_t>(batch.starts.size()) - 1;
  args.num_tokens = args.max_seqlen_q = batch.starts.back();
  args.num_kv_heads = batch.num_kv_heads;
  args.table_heads = args.stride_seq_lens_seq = batch.per_head ? batch.num_kv_heads : 1;
  args.table_heads_divisor = effllm::FastDivisor::of(args.table_heads);
  args.num_tables = static_cast<int>(batch.lengths.size());
  args.heads_per_table = batch.per_head ? 1 : batch.num_kv_heads;
  args.max_pages_per_seq = INT32_MAX, args.page_size = 1;
  args.seq_lens = batch.lengths.data(), args.cu_seqlens_q = batch.starts.data();
  args.causal = true, args.window = batch.window;
  args.num_shares = batch.num_shares;
  args.split_size = batch.split_size;
  args.split_size_divisor = effllm::FastDivisor::of(max<int64_t>(batch.split_size, 1));
  args.group = 1, args.group_divisor = effllm::FastDivisor::of(1);
  args.max_rows = batch.max_rows;
  args.sink_tokens = batch.sink_tokens;

  std::map<std::pair<int, int>, std::vector<Piece>> pieces_of;
  std::vector<int64_t> blocks_of_share(batch.num_shares);
  std::map<std::pair<int, bool>, int> places;  // where parts are left
  const bool fixed = batch.split_size > 0;
  const std::vector<Piece> all = share_out<Config>(args);
  for (const Piece& piece : all) {
    pieces_of[{piece.part.table_idx, piece.part.head}].push_back(piece);
    blocks_of_share[piece.share] += piece.part.end - piece.part.begin;
    const int slot = piece.part.first_slot + piece.part.idx;
    if (fixed) {
      if (++places[{slot, true}] > 1) return "two pieces have one slot";
      continue;
    }
    if (piece.part.num_parts == 1) continue;
    if (slot != piece.share) return "a part's number is wrong";
    if (++places[{piece.share, piece.part.idx == 0}] > 1) return "two parts have one place";
  }
  int64_t all_blocks = 0, pairs = 0, longest = 0, split_pairs = 0;
  for (int table_idx = 0; table_idx < args.num_tables; ++table_idx) {
    const effllm::Sequence sequence(args, table_idx);
    if (sequence.first_kv_head != (batch.per_head ? table_idx % batch.num_kv_heads : 0)) {
      return "a table is of another head";
    }
    const effllm::SeenKeys seen = sequence.seen_keys(args);
    const bool taken = sequence.num_queries <= batch.max_rows;
    const int64_t blocks =
        taken ? effllm::head_blocks<Config>(args, seen) +
                    ceil_div<int64_t>(seen.keys.end - seen.keys.begin, Config::kBlockKeys)
              : 0;
    if (fixed && !seen.keys.empty() && seen.keys.begin % batch.split_size != 0)
      return "pieces are not at multiples";
    for (int head = 0; head < args.heads_per_table; ++head) {
      const auto& pieces = pieces_of[{table_idx, head}];
      int64_t next = 0;
      for (size_t i = 0; i < pieces.size(); ++i) {
        const DecodePart& part = pieces[i].part;
        if (part.begin != next) return "blocks are left out, or had twice";
        if (part.num_parts != static_cast<int>(pieces.size())) return "parts are miscounted";
        if (part.idx != static_cast<int>(i)) return "parts are out of order";
        if (fixed && part.begin * Config::kBlockKeys != part.idx * batch.split_size) {
          return "a piece does not begin at a multiple of the split size";
        }
        next = part.end;
      }
      if (taken && !has_seen_keys<Config>(args, sequence, pieces)) return "keys are not those seen";
      if (next != blocks) return "not all blocks are there, or too many";
      all_blocks += blocks, pairs += blocks > 0;
      longest = max(longest, blocks), split_pairs += pieces.size() > 1;
    }
  }
  // Who waits for the CTA of the first part, waits for one that began with it.
  std::vector<const Piece*> first_of_share(batch.num_shares);
  for (const Piece& piece : all) {
    if (first_of_share[piece.share] == nullptr) first_of_share[piece.share] = &piece;
  }
  for (const auto& [pair, pieces] : pieces_of) {
    if (pieces.empty() || pieces.front().share == pieces.back().share) continue;
    const DecodePart& begun = first_of_share[pieces.front().share]->part;
    if (begun.table_idx != pair.first || begun.head != pair.second || begun.idx != 0) {
      return "others wait for a part that its share does not begin with";
    }
  }
  if (fixed) {
    const int64_t pieces = ceil_div<int64_t>(static_cast<int64_t>(all.size()), batch.num_shares);
    for (const int64_t blocks : blocks_of_share) {
      if (blocks > pieces * batch.split_size / Config::kBlockKeys) return "a share is too large";
    }
    return nullptr;
  }
  if (longest <= Config::kUnsplitBlocks && pairs <= args.num_shares && split_pairs > 0) {
    return "short sequences are split";
  }
  // Balanced: nobody has much more than all blocks and starts evenly divided.
  const int64_t even =
      ceil_div<int64_t>(all_blocks + pairs * Config::kStartBlocks, args.num_shares);
  const int64_t most = max<int64_t>(even, Config::kUnsplitBlocks) + Config::kStartBlocks;
  for (const int64_t blocks : blocks_of_share) {
    if (blocks > most) return "a share is too large";
  }
  return nullptr;
}

template <class Config>
bool check_all(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](unsigned limit) { return static_cast<int>(random() % limit); };
  for (int round = 0; round < 400; ++round) {
    Batch batch;
    const int num_seqs = below(4) == 0 ? below(150) : below(12);
    const int longest = 1 << below(19), kind = below(3);
    batch.num_kv_heads = 1 + below(9), batch.num_shares = 1 + below(50);
    batch.per_head = below(4) == 0;
    for (int seq_idx = 0; seq_idx < num_seqs; ++seq_idx) {
      for (int table = 0; table < (batch.per_head ? batch.num_kv_heads : 1); ++table) {
        const int length = kind == 0 ? longest : below(3) > 0 ? below(longest) : 0;
        batch.lengths.push_back(kind == 2 && seq_idx != num_seqs / 2 ? length % 100 : length);
      }
      batch.starts.push_back(batch.starts.back() +
                             (below(8) > 0 ? 1 + below(below(4) > 0 ? 3 : 30) : 0));
    }
    if (below(4) == 0) {
      batch.window = 1 + below(2000);
      batch.sink_tokens = below(3) > 0 ? below(1 << below(10)) : 0;
    }
    if (below(4) == 0) batch.max_rows = below(4);
    if (batch.sink_tokens > 0 || below(3) == 0)
      batch.split_size = (1 + below(below(2) > 0 ? 4 : 100)) * 64;
    if (const char* broken = check<Config>(batch)) {
      std::printf("%s: HKV %d, %d shares, window %lld, sink tokens %d, split size %lld, lengths",
                  broken, batch.num_kv_heads, batch.num_shares,
                  static_cast<long long>(batch.window), batch.sink_tokens,
                  static_cast<long long>(batch.split_size));
      for (const int length : batch.lengths) std::printf(" %d", length);
      std::printf(", starts of queries");
      for (const int start : batch.starts) std::printf(" %d", start);
      std::printf("\n");
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  return check_all<effllm::PagedDecodeConfig<effllm::bfloat16, 128, 8>>(1) &&
                 check_all<effllm::PagedDecodeConfig<effllm::float16, 256, 4>>(2)
             ? 0
             : 1;
}
