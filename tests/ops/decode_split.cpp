// Runs DecodeSchedule on the CPU for random batches; test_decode_split.py compiles it. Prints the
// first batch that is not shared out as decode_split.cuh promises and fails, or nothing.
#include "attention/decode_split.cuh"

#include <cuda_runtime.h>

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
  std::vector<int> lengths, starts{0};
  int num_kv_heads, num_shares;
  int64_t window = PagedAttentionParams::kNoWindow;
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
      schedule.start(args, share);
      for (; schedule.valid(); schedule.advance(args)) {
        const DecodePart& part = schedule.part();
        if (threadIdx.x == 0 && part.begin < part.end) pieces.push_back({share, part});
      }
    });
  }
  return pieces;
}

// The first promise that is broken; null if none is.
template <class Config>
const char* check(const Batch& batch) {
  PagedAttentionArgs args{};
  args.num_seqs = static_cast<int64_t>(batch.lengths.size());
  args.num_tokens = args.max_seqlen_q = batch.starts.back();
  args.num_kv_heads = batch.num_kv_heads;
  args.max_pages_per_seq = INT32_MAX, args.page_size = 1;
  args.seq_lens = batch.lengths.data(), args.cu_seqlens_q = batch.starts.data();
  args.causal = true, args.window = batch.window;
  args.num_shares = batch.num_shares;

  std::map<std::pair<int, int>, std::vector<Piece>> pieces_of;
  std::vector<int64_t> blocks_of_share(batch.num_shares);
  std::map<std::pair<int, bool>, int> places;  // where shares leave parts
  for (const Piece& piece : share_out<Config>(args)) {
    pieces_of[{piece.part.seq_idx, piece.part.kv_head}].push_back(piece);
    blocks_of_share[piece.share] += piece.part.end - piece.part.begin;
    if (piece.part.num_parts == 1) continue;
    if (piece.part.first_share + piece.part.idx != piece.share) return "a part's number is wrong";
    if (++places[{piece.share, piece.part.idx == 0}] > 1) return "two parts have one place";
  }
  int64_t all_blocks = 0, pairs = 0, longest = 0, split_pairs = 0;
  for (int seq_idx = 0; seq_idx < args.num_seqs; ++seq_idx) {
    const effllm::KeyRange seen = effllm::Sequence(args, seq_idx).seen_keys(args);
    const int64_t blocks = ceil_div<int64_t>(seen.end - seen.begin, Config::kBlockKeys);
    for (int head = 0; head < batch.num_kv_heads; ++head) {
      const auto& pieces = pieces_of[{seq_idx, head}];
      int64_t next = 0;
      for (size_t i = 0; i < pieces.size(); ++i) {
        const DecodePart& part = pieces[i].part;
        if (part.begin != next) return "blocks are left out, or had twice";
        if (part.num_parts != static_cast<int>(pieces.size())) return "parts are miscounted";
        if (part.idx != static_cast<int>(i)) return "parts are out of order";
        next = part.end;
      }
      if (next != blocks) return "not all blocks are there, or too many";
      all_blocks += blocks, pairs += blocks > 0;
      longest = max(longest, blocks), split_pairs += pieces.size() > 1;
    }
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
    for (int seq_idx = 0; seq_idx < num_seqs; ++seq_idx) {
      const int length = kind == 0 ? longest : below(3) > 0 ? below(longest) : 0;
      batch.lengths.push_back(kind == 2 && seq_idx != num_seqs / 2 ? length % 100 : length);
      batch.starts.push_back(batch.starts.back() + (below(8) > 0 ? 1 + below(3) : 0));
    }
    batch.num_kv_heads = 1 + below(9), batch.num_shares = 1 + below(50);
    if (below(4) == 0) batch.window = 1 + below(2000);
    if (const char* broken = check<Config>(batch)) {
      std::printf("%s: HKV %d, %d shares, window %lld, lengths and queries", broken,
                  batch.num_kv_heads, batch.num_shares, static_cast<long long>(batch.window));
      for (int i = 0; i < num_seqs; ++i) {
        std::printf(" %d/%d", batch.lengths[i], batch.starts[i + 1] - batch.starts[i]);
      }
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
