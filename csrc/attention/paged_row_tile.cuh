// A CTA's tile of packed rows (query, head in group) of one (sequence, KV head) against keys: of
// prefill, where a tile sees all its keys (paged_prefill.cuh), and of steps of some tokens, where
// keys are split over CTAs (paged_extend.cuh).
//
//   shared memory, in panels of 8 chunks of 16 bytes; the page table says where a key's row is from
//
//          chunk 0 1 2 .. D/8
//     q    row 0 [ . . . . ]      of each 64 rows warp w owns 16w .. 16w + 15:
//     k    key 0 [ . . . . ]        S[64, N] = Q[64, D] K[N, D]^T
//     v    key 0 [ . . . . ]        P = 2^(S - maximum)               in registers
//                                   O[64, D] += P[64, N] V[N, D]      paged_tile_products.cuh
//
//   With one buffer each V arrives while S is computed, the next K while O is; with two, those of
//   the tile behind.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/online_softmax.cuh"
#include "attention/paged_key_loader.cuh"
#include "attention/paged_row_tile_storage.cuh"
#include "attention/paged_sequence.cuh"
#include "attention/paged_tile_products.cuh"
#include "attention/tree_row.cuh"
#include "attention/value_exponent.cuh"
#include "common/math.h"
#include "ptx/cp_async.cuh"
#include "quant/dequant.cuh"

namespace effllm {

template <class Config>
class PagedRowTile {
  using Element = typename Config::Element;
  using Storage = PagedRowTileStorage<Config>;
  static constexpr int kKeyTiles = Config::kBlockN / 8;
  static constexpr int kDimTiles = Config::kHeadDim / 8;
  static constexpr int kRowTiles = Config::kRowTiles;
  using Octet = KvOctet<typename Config::Kv>;
  using Products = PagedTileProducts<Config>;
  using Scores = typename Products::Scores;

 public:
  // For the rows first_row .. first_row + kBlockM - 1 of the sequence's and the KV head's; there is
  // at least one.
  __device__ __forceinline__ PagedRowTile(const PagedAttentionArgs& args, Storage& smem,
                                          const Sequence& sequence, int kv_head, int first_row)
      : args_(args),
        smem_(smem),
        sequence_(sequence),
        loader_(args, smem, sequence, kv_head),
        kv_head_(kv_head),
        first_row_(first_row),
        num_rows_(sequence.num_queries * args.group),
        warp_row_(thread_in_team<Config>() / 32 * 16),
        lane_idx_(thread_in_team<Config>() % 32) {
    find_common_keys();
    if constexpr (!Config::kRunsOnce) {
      load_queries();
      locate_biases();
    }
  }

  // Adds keys of the head, or keys behind it, to what the rows have seen.
  __device__ __forceinline__ void run(KeyRange keys) {
    if (keys.empty()) return;
    keys_ = keys;
    const int num_tiles = ceil_div(keys.end - keys.begin, Config::kBlockN);
    constexpr int kStages = Config::kStages;
    sync_team<Config>();  // every warp is done with the words of the keys before
    loader_.find_pages(keys, 0);
    if constexpr (Config::kRunsOnce) load_queries();
#pragma unroll 1
    for (int tile = 0; tile < kStages; ++tile) {
      locate_tile(tile, num_tiles);
      loader_.store_words(tile);
    }
    sync_team<Config>();  // the offsets are there
#pragma unroll 1
    for (int i = 0; i < kStages * 2 - 1; ++i) loader_.begin(i, num_tiles);
    if constexpr (Config::kRunsOnce) locate_biases();  // seen behind the next barrier
    int tile = 0;
    do {  // a loop that could run zero times would make ptxas serialise wgmma
      loader_.finish_keys(tile);
      Products::publish();
      sync_team<Config>();  // this K is there, so are the queries; every warp is done with the last
                            // V
      loader_.begin(2 * (tile + kStages) - 1, num_tiles);
      locate_tile(tile + kStages, num_tiles);
      Scores scores;
      Products::scores(scores, smem_.q, smem_.k[tile % kStages], warp_has_rows());
      loader_.finish_values(tile);
      loader_.store_words(tile + kStages);
      Products::publish();
      sync_team<Config>();  // this V is there, so are the next offsets; every warp is done with
                            // this K
      loader_.begin(2 * (tile + kStages), num_tiles);
      if (warp_has_rows()) softmax(scores, tile);
      Products::accumulate(output_, scores, smem_.v[tile % kStages], warp_has_rows());
    } while (++tile < num_tiles);
  }

  // All keys that a row of the tile sees, those of the head apart.
  __device__ __forceinline__ SeenKeys seen_keys() const {
    const KeyRange keys = {visible_keys_of_row(0).begin,
                           visible_keys_of_row(Config::kBlockM - 1).end};
    const int head_end = min(args_.sink_tokens, keys.end);
    return {head_end, {max(keys.begin, head_end), keys.end}};
  }

  // The rows' results, where they have seen all their keys.
  __device__ __forceinline__ void store() {
    ptx::cp_async_wait<0>();
    sync_team<Config>();  // nothing comes to the queries' place any more
    if (!warp_has_rows()) return;
    finish_sums();
    store_output();
  }

  // What the teams of the CTA have, added up by the first of them and left in its shared memory for
  // others: outputs, not yet divided, as smem.output_quad, and maxima and sums of weights in
  // softmax[0]. All teams call, `tiles` are theirs.
  __device__ __forceinline__ void leave(Storage* tiles, float2 (*softmax)[Config::kBlockM]) {
    static_assert(kRowTiles == 1);
    ptx::cp_async_wait<0>();
    sync_team<Config>();  // nobody reads or writes queries, keys or values any more
    if (warp_has_rows()) finish_sums();
    if (num_teams<Config>() > 1) {
      if (team_idx<Config>() > 0 && warp_has_rows()) {
        leave_softmax(softmax[team_idx<Config>()]);
#pragma unroll
        for (int tile = 0; tile < kDimTiles; ++tile) {
          const auto& o = output_[0][tile];
          smem_.output_fragment(tile) = {o[0], o[1], o[2], o[3]};
        }
      }
      __syncthreads();
    }
    if (team_idx<Config>() > 0 || !warp_has_rows()) return;
#pragma unroll 1
    for (int team = 1; team < num_teams<Config>(); ++team) add(tiles[team], softmax[team]);
    leave_softmax(softmax[0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) {
        auto* pairs = reinterpret_cast<float2*>(
            &smem_.output_quad(row_of_half(half), tile / 4 * 8, tile % 4 * 2 + lane_idx_ % 4 / 2));
        pairs[lane_idx_ % 2] = {output_[0][tile][half * 2], output_[0][tile][half * 2 + 1]};
      }
    }
  }

 private:
  __device__ __forceinline__ bool warp_has_rows() const {
    return first_row_ + warp_row_ < num_rows_;
  }

  // The first of the 16 rows that the warp has of a row tile.
  __device__ __forceinline__ int row_of(int row_tile) const { return row_tile * 64 + warp_row_; }

  __device__ __forceinline__ int query_of_row(int row) const {
    return static_cast<int>(args_.group_divisor.quotient(row));
  }

  // The keys that a row of the tile sees, in a tree the range that holds them. Rows past the last,
  // whose results are not stored, go along with it.
  __device__ __forceinline__ KeyRange visible_keys_of_row(int row) const {
    const int query_idx = query_of_row(min(first_row_ + row, num_rows_ - 1));
    return in_tree() ? sequence_.keys_of_path(args_, query_idx)
                     : sequence_.visible_keys(args_, query_idx);
  }

  __device__ __forceinline__ bool in_tree() const {
    return Config::kTrees && args_.tree_mask != nullptr;
  }

  // Keys that all rows of the warp see; of a tree none but those ahead of it. There a row's path is
  // not longer than the tokens up to its own, so that it sees what a chain of these would.
  __device__ __forceinline__ void find_common_keys() {
    // Rows 16 i + lane % 16 of the warp's, for all i that there are.
    const int row = row_of(lane_idx_ / 16 % kRowTiles) + lane_idx_ % 16;
    KeyRange keys =
        sequence_.visible_keys(args_, query_of_row(min(first_row_ + row, num_rows_ - 1)));
    if (in_tree()) keys.end = min(keys.end, max(sequence_.first_position, 0));
    common_keys_ = {__reduce_max_sync(~0u, keys.begin), __reduce_min_sync(~0u, keys.end)};
  }

  __device__ __forceinline__ void locate_tile(int tile, int num_tiles) {
    if (tile < num_tiles) loader_.locate_keys(keys_, tile);
    if (tile + 1 < num_tiles) loader_.find_pages(keys_, tile + 1);
  }

  __device__ __forceinline__ void load_queries() {
    const auto* q = static_cast<const Element*>(args_.q);
    const int dim_chunks = static_cast<int>(args_.head_dim) / 8;
#pragma unroll 2
    for (int i = thread_in_team<Config>(); i < Config::kBlockM * Config::kChunks;
         i += Config::kTileThreads) {
      const int row = i / Config::kChunks, chunk = i % Config::kChunks;
      const bool valid = first_row_ + row < num_rows_ && chunk < dim_chunks;
      const Element* src = q;
      if (valid) {
        const int query_idx = query_of_row(first_row_ + row);
        const int head = kv_head_ * args_.group + first_row_ + row - query_idx * args_.group;
        src += (sequence_.first_token + query_idx) * args_.stride_q_token +
               head * args_.stride_q_head + chunk * 8;
      }
      ptx::cp_async_16(&chunk_of(smem_.q, row, chunk), src, valid);
    }
    ptx::cp_async_commit();  // a group of their own: there may be no keys to go with
  }

  // What the scores of each row get besides. Rows past the last go along with it.
  __device__ __forceinline__ void locate_biases() {
    static_assert(Config::kBlockM <= Config::kTileThreads);
    const int idx = thread_in_team<Config>();
    if (idx >= Config::kBlockM) return;
    const int row = min(first_row_ + idx, num_rows_ - 1);
    const OutputRow out_row(args_, sequence_, kv_head_, row);
    smem_.sink[idx] = sink_score(args_, out_row.head);
    if (in_tree()) smem_.tree[idx] = TreeRow::of(args_, sequence_, row);
    if (args_.alibi_slopes != nullptr) {
      AlibiRow& alibi = smem_.alibi[idx];
      alibi = AlibiRow::of(args_, sequence_, kv_head_, row);
      if (in_tree()) alibi.position = smem_.tree[idx].position();
    }
  }

  __device__ __forceinline__ int first_key_of(int tile) const {
    return keys_.begin + tile * Config::kBlockN;
  }

  // Scores become weights 2^(x - maximum); output and sums so far are brought to the new maximum.
  __device__ __forceinline__ void softmax(Scores& scores, int tile_idx) {
    const ScoreMap map(args_);
    const bool left_factor = map.is_positive_factor() && args_.alibi_slopes == nullptr;
    const int first_key = first_key_of(tile_idx);
    // Most tiles lie inside the range of every row: no comparisons there.
    const bool whole = first_key >= common_keys_.begin &&
                       first_key + Config::kBlockN <= min(common_keys_.end, keys_.end);
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      if constexpr (Config::kQuantized)
        scale_keys(scores[row_tile], smem_.k_word[Storage::slot(tile_idx)]);
      if (!left_factor) map.apply(scores[row_tile]);
      if (args_.alibi_slopes != nullptr) add_biases(scores[row_tile], row_tile, first_key);
      if (!whole) mask(scores[row_tile], row_tile, first_key);
      update_rows(scores[row_tile], row_tile, left_factor ? map.factor() : 1.f);
    }
    if constexpr (Config::kQuantized) scale_weights(scores, smem_.v_word[Storage::slot(tile_idx)]);
  }

  // The scale of key `i % 2` of this lane's two of a tile of 8.
  static __device__ __forceinline__ float key_scale(const uint32_t* words, int tile, int i) {
    return Octet::scale(words[tile * 8 + threadIdx.x % 4 * 2 + i % 2]);
  }

  static __device__ __forceinline__ void scale_keys(float (&scores)[kKeyTiles][4],
                                                    const uint32_t* words) {
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][i] *= key_scale(words, tile, i);
    }
  }

  __device__ __forceinline__ void scale_weights(Scores& weights, const uint32_t* words) {
    float largest = 0.f, factor;
#pragma unroll
    for (int i = 0; i < kKeyTiles * 2; ++i) {
      largest = fmaxf(largest, fabsf(key_scale(words, i / 2, i)));
    }
    if (value_exponent_.grow(largest, factor)) multiply_output(factor);
#pragma unroll
    for (auto& of_row_tile : weights) {
#pragma unroll
      for (int i = 0; i < kKeyTiles * 4; ++i) {
        of_row_tile[i / 4][i % 4] *= key_scale(words, i / 4, i) * value_exponent_.inverse();
      }
    }
  }

  __device__ __forceinline__ void multiply_output(float factor) {
#pragma unroll
    for (auto& of_row_tile : output_) {
#pragma unroll
      for (int i = 0; i < kDimTiles * 4; ++i) of_row_tile[i / 4][i % 4] *= factor;
    }
  }

  __device__ __forceinline__ void add_biases(float (&scores)[kKeyTiles][4], int row_tile,
                                             int first_key) const {
    const int row = row_of(row_tile) + lane_idx_ / 4;
    const bool beside_paths = in_tree() && first_key + Config::kBlockN > common_keys_.end;
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + tile * 8 + lane_idx_ % 4 * 2 + i % 2, idx = row + i / 2 * 8;
        const int position = beside_paths ? smem_.tree[idx].position_of(key) : key;
        scores[tile][i] = smem_.alibi[idx].biased(scores[tile][i], position);
      }
    }
  }

  __device__ __forceinline__ void mask(float (&scores)[kKeyTiles][4], int row_tile,
                                       int first_key) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A bit for each key: with a comparison for each there would be much code, fetched for it.
      const int row = row_of(row_tile) + half * 8 + lane_idx_ / 4;
      KeyRange keys = visible_keys_of_row(row);
      if (first_key < args_.sink_tokens) keys.begin = 0;
      uint64_t seen =
          bits_below(min(keys.end, keys_.end) - first_key) & ~bits_below(keys.begin - first_key);
      if (in_tree()) {
        const TreeRow& tree = smem_.tree[row];
        uint64_t on_path = tree.sees(first_key);
        if constexpr (Config::kBlockN > 32) {
          on_path |= uint64_t{tree.sees(first_key + 32)} << 32;
        }
        seen &= on_path;
      }
      seen >>= lane_idx_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < kKeyTiles * 2; ++i) {
        float& score = scores[i / 2][half * 2 + i % 2];
        if ((seen >> (i / 2 * 8 + i % 2) & 1) == 0) score = kMaskedScore;
      }
    }
  }

  static __device__ __forceinline__ uint64_t bits_below(int count) {
    return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << max(count, 0)) - 1;
  }

  // `factor`: what scores lack, positive.
  __device__ __forceinline__ void update_rows(float (&scores)[kKeyTiles][4], int row_tile,
                                              float factor) {
    SoftmaxRow(&rows)[2] = rows_[row_tile];
    float maximum[2] = {kMaskedScore, kMaskedScore};
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) maximum[i / 2] = fmaxf(maximum[i / 2], scores[tile][i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The four lanes of a quad hold the keys of one row.
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 1));
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 2));
      maximum[half] = fmaxf(rows[half].maximum, maximum[half] * factor);
    }
    // Rescaling can wait while weights stay under 2^8: rare, and a branch of the whole warp.
    constexpr float kSlack = 8.f;
    if (__any_sync(
            ~0u, maximum[0] > rows[0].maximum + kSlack || maximum[1] > rows[1].maximum + kSlack)) {
      rescale(row_tile, maximum);
    }
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = scores[tile][i];
        x = ptx::exp2_approx(fmaf(x, factor, -rows[i / 2].maximum));
        rows[i / 2].sum += x;
      }
    }
  }

  __device__ __forceinline__ void rescale(int row_tile, const float (&maximum)[2]) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxRow& row = rows_[row_tile][half];
      factor[half] = ptx::exp2_approx(row.maximum - maximum[half]);
      row.maximum = maximum[half];
      row.sum *= factor[half];
    }
#pragma unroll
    for (int i = 0; i < kDimTiles * 4; ++i) output_[row_tile][i / 4][i % 4] *= factor[i % 4 / 2];
  }

  // Of the lanes that share a row; and takes back the power of two that was left in outputs.
  __device__ __forceinline__ void finish_sums() {
    if constexpr (Config::kQuantized) multiply_output(value_exponent_.factor());
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      SoftmaxRow& row = rows_[i / 2][i % 2];
      row.sum += __shfl_xor_sync(~0u, row.sum, 1);
      row.sum += __shfl_xor_sync(~0u, row.sum, 2);
    }
  }

  __device__ __forceinline__ int row_of_half(int half) const {
    return warp_row_ + half * 8 + lane_idx_ / 4;
  }

  __device__ __forceinline__ void leave_softmax(float2* softmax) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SoftmaxRow& row = rows_[0][half];
      if (lane_idx_ % 4 == 0) softmax[row_of_half(half)] = {row.maximum, row.sum};
    }
  }

  // What the thread of the same place in another team has left.
  __device__ __forceinline__ void add(Storage& other, const float2* softmax) {
    float own_factor[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxRow& row = rows_[0][half];
      const float2 of_other = softmax[row_of_half(half)];
      const float maximum = fmaxf(row.maximum, of_other.x);
      own_factor[half] = ptx::exp2_approx(row.maximum - maximum);
      factor[half] = ptx::exp2_approx(of_other.x - maximum);
      row.maximum = maximum;
      row.sum = row.sum * own_factor[half] + of_other.y * factor[half];
    }
#pragma unroll
    for (int tile = 0; tile < kDimTiles; ++tile) {
      const float4 value = other.output_fragment(tile);
      auto& o = output_[0][tile];
      o[0] = o[0] * own_factor[0] + value.x * factor[0];
      o[1] = o[1] * own_factor[0] + value.y * factor[0];
      o[2] = o[2] * own_factor[1] + value.z * factor[1];
      o[3] = o[3] * own_factor[1] + value.w * factor[1];
    }
  }

  // Divides by the sums and writes the warp's rows through its part of q, 16 bytes per lane.
  __device__ __forceinline__ void store_output() {
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      const SoftmaxRow& row = rows_[i / 2][i % 2];
      const int row_idx = row_of(i / 2) + i % 2 * 8 + lane_idx_ / 4;
      const float inverse = row.inverse_sum(smem_.sink[row_idx]);
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) {
        auto* chunk = reinterpret_cast<uint32_t*>(&chunk_of(smem_.q, row_idx, tile));
        const float* pair = &output_[i / 2][tile][i % 2 * 2];
        chunk[lane_idx_ % 4] = ptx::pack_pair<Element>(pair[0] * inverse, pair[1] * inverse);
      }
      if (lane_idx_ % 4 == 0 && first_row_ + row_idx < num_rows_) {
        const OutputRow out_row(args_, sequence_, kv_head_, first_row_ + row_idx);
        args_.lse[out_row.idx] = row.lse2() * kLn2;
      }
    }
    __syncwarp();
    const int dim_chunks = static_cast<int>(args_.head_dim) / 8;
    for (int i = lane_idx_; i < kRowTiles * 16 * Config::kChunks; i += 32) {
      const int warp_row = i / Config::kChunks, chunk = i % Config::kChunks;
      const int row_idx = row_of(warp_row / 16) + warp_row % 16;
      if (first_row_ + row_idx >= num_rows_ || chunk >= dim_chunks) continue;
      const OutputRow out_row(args_, sequence_, kv_head_, first_row_ + row_idx);
      auto* dst = static_cast<Element*>(args_.out) + out_row.idx * args_.head_dim + chunk * 8;
      *reinterpret_cast<uint4*>(dst) = chunk_of(smem_.q, row_idx, chunk);
    }
  }

  const PagedAttentionArgs& args_;
  Storage& smem_;
  const Sequence& sequence_;
  PagedKeyLoader<Config> loader_;
  const int kv_head_, first_row_, num_rows_;
  const int warp_row_, lane_idx_;  // in the tile's team
  KeyRange keys_;                  // that `run` adds
  KeyRange common_keys_;           // that all rows of the warp see
  // This thread's part of its warp's row tiles: rows lane / 4 and lane / 4 + 8 of each.
  SoftmaxRow rows_[kRowTiles][2];
  typename Products::Output output_ = {};
  ValueExponent value_exponent_;  // of quantised caches
};

}  // namespace effllm
