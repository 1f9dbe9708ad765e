// Paged attention for few query rows: decode and short speculative steps, keys split over CTAs.
//
// Roofline: bytes. Each key costs 4 * D bytes of K and V (in e4m3 and int8 2 * D + 8, in int4 D +
// 8), read once; an H100 reads 3.06 TB/s. Nothing is staged: a warp loads a tile of keys from the
// cache straight into the registers of mma fragments (decode_kv.cuh), so any page size, stride and
// dtype costs the same.
//
//   part of a row tile:     keys  [ tile | tile | tile | ... ]    16 keys each, of int4 32
//                           warp      0      1      2   ...  0 ..
//
// Warps merge in shared memory, parts in the CTA that is done last (combine.cuh), both in a fixed
// order. Who has which part says decode_split.cuh.
//
// For one sequence time is latency, and hides little: launch, lengths, page table, keys, values,
// merge. So the kernel may be launched before the one ahead is done, finds its share until then and
// asks for its first keys to come to L2 (decode_prefetch.cuh); a warp has a tile of K and of V on
// the way at any time, of D = 128 in 16 bits 64 KiB per multiprocessor, where 3 TB/s over 132 of
// them at 0.8 us need 18 KiB; and there are then no more CTAs than multiprocessors, so that little
// has to be merged.
#pragma once

#include <cstdint>

#include "attention/alibi.cuh"
#include "attention/combine.cuh"
#include "attention/decode_kv.cuh"
#include "attention/decode_scores.cuh"
#include "attention/decode_share.cuh"
#include "attention/online_softmax.cuh"
#include "attention/tree_row.cuh"
#include "cuda/launch.h"
#include "ptx/load.cuh"

namespace effllm {

// What the CTA works on, and the warps' results, merged after the loop.
template <class Config>
struct PagedDecodeStorage {
  DecodeShare<Config> share;
  DecodeTileKeys<Config> keys[Config::kWarps];
  // Rows are padded by 16 bytes against bank conflicts.
  alignas(16) float output[Config::kWarps][Config::kRows][Config::kHeadDim + 4];
  float maximum[Config::kWarps][Config::kRows];
  float sum[Config::kWarps][Config::kRows];
  AlibiRow alibi[Config::kRows];  // unless there are no slopes
  TreeRow tree[Config::kRows];    // unless there is no tree
  bool is_last;                   // this CTA merges the parts
  // Of the pair's scores, if they are wanted: where each warp leaves them, what weights of each row
  // are powers against, which CTA this is of those that arrive, and the slices that it adds.
  ScorePlaces scores[Config::kWarps];
  float weight_base[Config::kRows];
  int arrival;
  uint32_t slices;
};

template <class Config>
class PagedDecode {
  using Element = typename Config::Element;
  using Tile = DecodeTile<Config>;
  using Kv = DecodeKv<Config>;
  using Scores = typename Kv::Scores;

 public:
  __device__ __forceinline__ PagedDecode(const PagedAttentionArgs& args, const Sequence& sequence,
                                         const Tile& tile, int kv_head,
                                         PagedDecodeStorage<Config>& smem)
      : args_(args),
        smem_(smem),
        kv_(args, sequence, kv_head, smem.keys[threadIdx.x / 32]),
        group_lane_(threadIdx.x % 32 / 4),
        quad_lane_(threadIdx.x % 4) {
    // What comes of rows past the last is not used.
    const int row_in_tile = threadIdx.x % Config::kRows;
    const int row = min(tile.first_row + row_in_tile, tile.num_rows - 1);
    const int query_idx = args.group_divisor.quotient(row);
    KeyRange visible;
    if (args.tree_mask != nullptr) {
      visible = sequence.keys_of_path(args, query_idx);
    } else {
      visible = sequence.visible_keys(args, query_idx);
    }
    smem.keys[threadIdx.x / 32].visible[row_in_tile] = visible;
    // Of a tree, all see no more than the keys ahead.
    if (args.tree_mask != nullptr) visible.end = min(visible.end, max(sequence.first_position, 0));
    seen_by_all_ = {__reduce_max_sync(~0u, visible.begin), __reduce_min_sync(~0u, visible.end)};
    __syncwarp();
    kv_.load_queries(tile.first_row, tile.num_rows);
    if constexpr (Config::kScores) {
      extern __shared__ __align__(1024) uint4 smem_raw[];
      const bool whole = smem.share.schedule.part().num_parts == 1;
      if (threadIdx.x % 32 == 0) {
        smem.scores[threadIdx.x / 32] = {reinterpret_cast<float*>(smem_raw),
                                         ScoreScratch(args, sequence, kv_head).of_pair(),
                                         whole && Config::kKeepsScores ? args.score_room : 0};
      }
      __syncwarp();
    }
  }

  // One warp's share of the keys of a part.
  __device__ __forceinline__ void run(KeyRange keys) {
    constexpr int kStride = Config::kWarps * Config::kTileKeys;
    int key = keys.begin + threadIdx.x / 32 * Config::kTileKeys;
    const auto load_keys = [&](int first_key) {
      if constexpr (!Config::kFindsAhead) kv_.find_page(first_key, keys.end);
      kv_.locate_keys();
      if constexpr (Config::kFindsAhead) kv_.find_page(first_key + kStride, keys.end);
      kv_.load_keys();
    };
    if (key < keys.end) {
      if constexpr (Config::kFindsAhead) kv_.find_page(key, keys.end);
      load_keys(key);
    }
    for (; key < keys.end; key += kStride) {
      if constexpr (Config::kOverlapLoads) kv_.load_values();
      Scores scores = {};
      kv_.compute_scores(scores);
      if constexpr (!Config::kOverlapLoads) kv_.load_values();
      const bool more = key + kStride < keys.end;
      if (Config::kOverlapLoads && more) load_keys(key + kStride);
      softmax(scores, key, keys.end);
      kv_.accumulate(output_, scores);
      if (!Config::kOverlapLoads && more) load_keys(key + kStride);
    }
    finish_sums();
    kv_.finish(output_);
  }

  __device__ __forceinline__ void store(PagedDecodeStorage<Config>& smem) const {
    const int warp_idx = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = quad_lane_ * 2 + i;
      if (group_lane_ == 0) {
        smem.maximum[warp_idx][row] = rows_[i].maximum;
        smem.sum[warp_idx][row] = rows_[i].sum;
      }
#pragma unroll
      for (int tile = 0; tile < Kv::kDimTiles; ++tile) {
        float* dim = &smem.output[warp_idx][row][kv_.first_dim(tile)];
        if constexpr (Kv::kPairDistance == 1) {
          *reinterpret_cast<float2*>(dim) = make_float2(output_[tile][i], output_[tile][i + 2]);
        } else {
          dim[0] = output_[tile][i];
          dim[Kv::kPairDistance] = output_[tile][i + 2];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void softmax(Scores& scores, int first_key, int end) {
    ScoreMap(args_).apply(scores);
    if (args_.alibi_slopes != nullptr) add_biases(scores, first_key);
    // All rows see all keys of most tiles. No part reaches from the head to what is behind it.
    const bool in_head = first_key < args_.sink_tokens;
    if ((first_key < seen_by_all_.begin && !in_head) ||
        first_key + Config::kTileKeys > min(seen_by_all_.end, end)) {
      for_each_score(scores, [&](float& x, int row, int key) {
        const int idx = first_key + key;
        const KeyRange visible = smem_.keys[threadIdx.x / 32].visible[quad_lane_ * 2 + row];
        if (idx >= end || idx >= visible.end || (idx < visible.begin && !in_head)) x = kMaskedScore;
      });
      if (args_.tree_mask != nullptr) mask_siblings(scores, first_key);
    }
    if constexpr (Config::kScores) {
      store_scores<Config>(args_, smem_.scores[threadIdx.x / 32], scores,
                           first_key + kv_.key_of_score(0, 0), quad_lane_ * 2);
    }
    float maximum[2] = {rows_[0].maximum, rows_[1].maximum};
    for_each_score(scores, [&](float x, int row, int) { maximum[row] = fmaxf(maximum[row], x); });
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      maximum[0] = fmaxf(maximum[0], __shfl_xor_sync(~0u, maximum[0], lanes));
      maximum[1] = fmaxf(maximum[1], __shfl_xor_sync(~0u, maximum[1], lanes));
    }
    // Rescaling can wait while weights stay under 2^8: rare, and a branch of the whole warp.
    constexpr float kSlack = 8.f;
    if (__any_sync(~0u, maximum[0] > rows_[0].maximum + kSlack ||
                            maximum[1] > rows_[1].maximum + kSlack)) {
      rescale(maximum);
    }
    for_each_score(scores, [&](float& x, int row, int) {
      x = ptx::exp2_approx(x - rows_[row].maximum);
      rows_[row].sum += x;
    });
    if constexpr (Config::kQuantized) {
      float factor;
      if (kv_.scale_weights(scores, factor)) {
#pragma unroll
        for (auto& tile : output_) {
#pragma unroll
          for (float& sum : tile) sum *= factor;
        }
      }
    }
  }

  __device__ __forceinline__ void add_biases(Scores& scores, int first_key) const {
    if (args_.tree_mask != nullptr && first_key + Config::kTileKeys > seen_by_all_.end) {
      for_each_score(scores, [&](float& x, int row, int key) {
        const int idx = quad_lane_ * 2 + row;
        x = smem_.alibi[idx].biased(x, smem_.tree[idx].position_of(first_key + key));
      });
    } else {
      for_each_score(scores, [&](float& x, int row, int key) {
        x = smem_.alibi[quad_lane_ * 2 + row].biased(x, first_key + key);
      });
    }
  }

  // In a tree: keys beside the paths of the rows.
  __device__ __forceinline__ void mask_siblings(Scores& scores, int first_key) const {
    static_assert(Config::kTileKeys <= 32);
    const uint32_t seen[2] = {smem_.tree[quad_lane_ * 2].sees(first_key),
                              smem_.tree[quad_lane_ * 2 + 1].sees(first_key)};
    for_each_score(scores, [&](float& x, int row, int key) {
      if ((seen[row] >> key & 1) == 0) x = kMaskedScore;
    });
  }

  // Calls `body` with each score, 0 or 1 for its row, 2c or 2c + 1, and its key's place in the
  // tile.
  template <class Body>
  __device__ __forceinline__ void for_each_score(Scores& scores, Body body) const {
#pragma unroll
    for (int group = 0; group < Config::kTileKeys / 16; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) body(scores[group][i], i % 2, kv_.key_of_score(group, i));
    }
  }

  __device__ __forceinline__ void rescale(const float (&maximum)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float factor = ptx::exp2_approx(rows_[row].maximum - maximum[row]);
      rows_[row].maximum = maximum[row];
      rows_[row].sum *= factor;
#pragma unroll
      for (auto& tile : output_) {
        tile[row] *= factor;
        tile[row + 2] *= factor;
      }
    }
  }

  __device__ __forceinline__ void finish_sums() {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      rows_[0].sum += __shfl_xor_sync(~0u, rows_[0].sum, lanes);
      rows_[1].sum += __shfl_xor_sync(~0u, rows_[1].sum, lanes);
    }
  }

  const PagedAttentionArgs& args_;
  PagedDecodeStorage<Config>& smem_;
  Kv kv_;
  const int group_lane_, quad_lane_;
  KeyRange seen_by_all_;
  SoftmaxRow rows_[2];
  typename Kv::Output output_ = {};
};

// Four dims of one row: the warps' shares in the order of the warps, not yet divided by the sum of
// weights. `total` gets the row's softmax.
template <class Config>
__device__ __forceinline__ float4 merge_warps(const PagedDecodeStorage<Config>& smem, int row,
                                              int dim, SoftmaxRow& total) {
  for (int warp = 0; warp < Config::kWarps; ++warp) {
    total.maximum = fmaxf(total.maximum, smem.maximum[warp][row]);
  }
  float4 sum = {};
#pragma unroll
  for (int warp = 0; warp < Config::kWarps; ++warp) {
    const float factor = ptx::exp2_approx(smem.maximum[warp][row] - total.maximum);
    const auto value = *reinterpret_cast<const float4*>(&smem.output[warp][row][dim]);
    total.sum += factor * smem.sum[warp][row];
    sum.x += factor * value.x;
    sum.y += factor * value.y;
    sum.z += factor * value.z;
    sum.w += factor * value.w;
  }
  return sum;
}

// What remains to be done with a part whose results are in memory, or, of a whole pair, whose bases
// are in `smem`: the last CTA of a pair merges its parts, and the sums are added to, by helpers
// where shares have one part each. Else a CTA that waits would keep the parts that it has next.
template <class Config, class MergeParts, class LeaveBase>
__device__ __forceinline__ void add_scores(const PagedAttentionArgs& args, const Sequence& sequence,
                                           int kv_head, int num_rows,
                                           const PartialResults<Config>& partial,
                                           PagedDecodeStorage<Config>& smem, MergeParts merge_parts,
                                           LeaveBase leave_base) {
  const DecodePart& part = smem.share.schedule.part();
  const bool whole = part.num_parts == 1;
  int num_helpers = 0, helper = 0;  // of this CTA; the last one's is num_helpers
  const auto helpers = [&] {
    return ScoreHelpers<Config>(partial, ScoreScratch(args, sequence, kv_head).word_of_pair(),
                                num_helpers);
  };
  uint32_t slices = 1;
  ScoreSums<Config> sums(args, sequence, kv_head);
  if (!whole) {
    __syncthreads();
    if (threadIdx.x == 0) smem.arrival = partial.arrive();
    __syncthreads();
    if (smem.share.schedule.one_part_each()) {
      num_helpers = ScoreHelpers<Config>::count(part.num_parts, sums.num_keys());
    }
    helper = smem.arrival - (part.num_parts - 1 - num_helpers);
    if (helper < 0) return;
    if (helper < num_helpers) {
      if (threadIdx.x == 0) smem.slices = helpers().wait(helper);
    } else {
      // By a warp that has no row to merge, if there is one.
      if (num_helpers > 0 && threadIdx.x == Config::kThreads - 1) smem.slices = helpers().take();
      merge_parts();
    }
    __syncthreads();
    if (num_helpers > 0) slices = smem.slices;
  }
  bool found = false;  // by all threads alike
  const auto find_bases = [&] {
    if (found) return;
    found = true;
    if (!whole) {
#pragma unroll 1
      for (int row = Config::kWarps - 1 - threadIdx.x / 32; row < num_rows; row += Config::kWarps) {
        const float lse = partial.lse(row);
        if (threadIdx.x % 32 == 0) leave_base(row, lse);
      }
    }
    __syncthreads();
  };
#pragma unroll 1
  for (uint32_t left = slices; left != 0; left &= left - 1) {
    sums.add(smem.scores[threadIdx.x / 32], __ffs(static_cast<int>(left)) - 1, max(num_helpers, 1),
             smem.weight_base, find_bases);
  }
  if (threadIdx.x == 0 && !whole) {
    if (num_helpers == 0) {
      partial.close();
    } else {
      helpers().leave(helper == num_helpers, slices);
    }
  }
}

// One CTA's part of a row tile. What the loop does not need is read again after it, from shared
// memory: registers are for keys and values on the way.
template <class Config>
__device__ __forceinline__ void decode_part(const PagedAttentionArgs& args,
                                            PagedDecodeStorage<Config>& smem) {
  using Element = typename Config::Element;
  const DecodePart& part = smem.share.schedule.part();
  const Sequence sequence(args, part.table_idx, typename Config::LoadLengths{});
  const int kv_head = sequence.first_kv_head + part.head;
  const DecodeTile<Config> tile(args, sequence, smem.share.row_tile);
  if (part.begin == part.end || tile.empty()) return;
  if (part.num_parts > 1 && part.idx == 0 && threadIdx.x == 0) {
    if constexpr (Config::kScores) {
      ScoreHelpers<Config>::open(ScoreScratch(args, sequence, kv_head).word_of_pair());
    }
    PartialResults<Config>(args, part, smem.share.row_tile).open();
  }
  if (args.alibi_slopes != nullptr || args.tree_mask != nullptr) {
    if (threadIdx.x < Config::kRows) {
      const int row = min(tile.first_row + static_cast<int>(threadIdx.x), tile.num_rows - 1);
      TreeRow& tree = smem.tree[threadIdx.x];
      AlibiRow& alibi = smem.alibi[threadIdx.x];
      if (args.tree_mask != nullptr) tree = TreeRow::of(args, sequence, row);
      if (args.alibi_slopes != nullptr) {
        alibi = AlibiRow::of(args, sequence, kv_head, row);
        if (args.tree_mask != nullptr) alibi.position = tree.position();
      }
    }
    __syncthreads();
  }
  {
    const KeyRange keys = keys_of_part<Config>(args, sequence.seen_keys(args), part, tile.keys);
    prefetch_page_row(args, sequence, keys);
    PagedDecode<Config> decode(args, sequence, tile, kv_head, smem);
    decode.run(keys);
    decode.store(smem);
  }
  if constexpr (Config::kScores) {
    const KeyRange keys = keys_of_part<Config>(args, sequence.seen_keys(args), part, tile.keys);
    ScoreSums<Config>(args, sequence, kv_head).prefetch(keys);
  }
  __syncthreads();

  const bool whole = part.num_parts == 1;
  const PartialResults<Config> partial(args, part, smem.share.row_tile);
  [[maybe_unused]] const auto leave_base = [&](int row, float lse) {
    const OutputRow out_row(args, sequence, kv_head, tile.first_row + row);
    smem.weight_base[row] = weight_base(lse, sink_score(args, out_row.head));
  };
  const int num_rows = min(tile.num_rows - tile.first_row, Config::kRows);
  const int dim_quads = static_cast<int>(args.head_dim) / 4;
  for (int i = threadIdx.x; i < num_rows * dim_quads; i += Config::kThreads) {
    const int row = i / dim_quads, dim = i % dim_quads * 4;
    SoftmaxRow total;
    float4 value = merge_warps(smem, row, dim, total);
    if (whole) {
      const OutputRow out_row(args, sequence, kv_head, tile.first_row + row);
      const float inverse = total.inverse_sum(sink_score(args, out_row.head));
      value = {value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse};
      store_output<Element>(args, out_row.idx, dim, value);
      if (dim == 0) {
        const float lse = total.lse2() * kLn2;
        args.lse[out_row.idx] = lse;
        if constexpr (Config::kScores) leave_base(row, lse);
      }
    } else {
      const int64_t partial_row = partial.row(part.idx, row);
      *reinterpret_cast<float4*>(args.partial_out + partial_row * args.head_dim + dim) = value;
      if (dim == 0) {
        reinterpret_cast<float2*>(args.partial_softmax)[partial_row] = {total.maximum, total.sum};
      }
    }
  }
  const auto merge_parts = [&] {
    for (int row = threadIdx.x / 32; row < num_rows; row += Config::kWarps) {
      const OutputRow out_row(args, sequence, kv_head, tile.first_row + row);
      partial.template merge<Config::kMergeBatch>(row, out_row);
    }
  };
  if constexpr (Config::kScores) {
    add_scores(args, sequence, kv_head, num_rows, partial, smem, merge_parts, leave_base);
  } else if (!whole) {
    __syncthreads();
    if (threadIdx.x == 0) smem.is_last = partial.arrive_last();
    __syncthreads();
    if (smem.is_last) merge_parts();
  }
}

// What h2o_attention never has, as constants: there is much less code then.
__device__ __forceinline__ PagedAttentionArgs without_options(PagedAttentionArgs args) {
  args.tree_mask = nullptr, args.alibi_slopes = nullptr;
  args.causal = true, args.window = PagedAttentionArgs::kNoWindow, args.sink_tokens = 0;
  args.split_size = 0, args.split_size_divisor = {1, 0, 0};
  args.num_row_tiles = 1, args.min_rows = 0, args.max_rows = INT32_MAX;
  args.max_seqlen_q = 1, args.num_tokens = args.num_seqs;
  return args;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    paged_decode_kernel(const __grid_constant__ PagedAttentionArgs args) {
  __shared__ PagedDecodeStorage<Config> smem;
  if constexpr (Config::kScores) {
    const PagedAttentionArgs simple = without_options(args);
    for_each_part<Config>(simple, smem.share, [&] { decode_part(simple, smem); });
  } else {
    for_each_part<Config>(args, smem.share, [&] { decode_part(args, smem); });
  }
}

// `args` has num_row_tiles and all that is of the decode kernel.
template <class Config>
void launch_paged_decode(const PagedAttentionArgs& args, cudaStream_t stream) {
  const auto ctas = static_cast<unsigned>(args.num_shares * args.num_row_tiles);
  size_t smem_bytes = 0;
  if (Config::kKeepsScores && args.score_room > 0) {
    smem_bytes = args.score_room * ScoreScratch::quads(args) * sizeof(float4);
    // Of any size, as what is not dynamic counts as well.
    check_cuda(cudaFuncSetAttribute(paged_decode_kernel<Config>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(smem_bytes)),
               "h2o_attention", "shared memory opt-in");
  }
  const Launch launch{"paged_attention", dim3(ctas), dim3(Config::kThreads), smem_bytes, stream, 1,
                      args.early_start};
  launch(paged_decode_kernel<Config>, args);
}

}  // namespace effllm
